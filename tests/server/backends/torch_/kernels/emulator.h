// Runs the kernels' own source on a CPU, in place of ptx.cu: every thread of a block is a fiber, barriers switch between them, and a
// warp's instructions exchange their operands through memory. Slow and exact; for tests of indices, layouts and synchronisation.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

using std::min;
using std::max;

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#define DYNAMIC_SHARED(name) u8* name = emulated::shared.data()

struct dim3 {
  u32 x, y, z;
};

namespace emulated {

struct Fiber {
  ucontext_t context;
  dim3 thread;
  bool done;
};

struct Exchange {  // of one warp
  u32 slots[32][8];
  int arrived, generation;
};

static std::vector<Fiber> fibers;
static std::vector<Exchange> warps;
static std::vector<u8> shared;
static ucontext_t scheduler;
static Fiber* current;
static int arrived, generation, alive;
static dim3 block, grid, block_size;
static void (*body)(void**);
static void** parameters;

static void yield() { swapcontext(&current->context, &scheduler); }

static void barrier(int& arrived, int& generation, int members) {
  const int mine = generation;
  if (++arrived == members) {
    arrived = 0;
    generation++;
    return;
  }
  while (generation == mine) yield();
}

static void enter() {
  body(parameters);
  current->done = true;
  alive--;
  swapcontext(&current->context, &scheduler);
}

static int lane() { return current->thread.x % 32; }
static Exchange& warp() { return warps[current->thread.x / 32]; }
static void meet() { barrier(warp().arrived, warp().generation, 32); }

static void run_block(std::vector<std::vector<u8>>& stacks) {
  const int threads = block_size.x;
  alive = threads;
  arrived = 0;
  warps.assign(threads / 32, Exchange{});
  std::fill(shared.begin(), shared.end(), 0xff);  // NaNs, where something is read before it is written
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.thread = {static_cast<u32>(i), 0, 0};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i].data();
    fiber.context.uc_stack.ss_size = stacks[i].size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  while (alive > 0)
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
    }
}

static void launch(void (*function)(void**), u32 x, u32 y, u32 z, u32 threads, u32 shared_bytes, void** arguments) {
  body = function;
  parameters = arguments;
  grid = {x, y, z};
  block_size = {threads, 1, 1};
  fibers.assign(threads, Fiber{});
  shared.assign(shared_bytes + 16, 0);
  std::vector<std::vector<u8>> stacks(threads, std::vector<u8>(64 << 10));
  for (u32 k = 0; k < z; k++)
    for (u32 j = 0; j < y; j++)
      for (u32 i = 0; i < x; i++) {
        block = {i, j, k};
        run_block(stacks);
      }
}

template <class... A, size_t... I>
void apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

template <class... A>
void call(void (*kernel)(A...), void** arguments) {
  apply(kernel, arguments, std::index_sequence_for<A...>{});
}

}  // namespace emulated

#define EXPORT(kernel)                                                                                          \
  extern "C" void emulate_##kernel(u32 x, u32 y, u32 z, u32 threads, u32 shared, void** arguments) {            \
    emulated::launch([](void** a) { emulated::call(kernel, a); }, x, y, z, threads, shared, arguments);         \
  }

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::block)
#define gridDim (emulated::grid)

static void __syncthreads() { emulated::barrier(emulated::arrived, emulated::generation, emulated::block_size.x); }
static void __threadfence() {}
static u32 atomicAdd(u32* address, u32 value) { return std::exchange(*address, *address + value); }
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
#define __expf(x) std::exp(x)

struct alignas(16) Quad {
  u32 word[4];
};

static float float_of_bits(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static u32 bits_of_float(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static float widen_half(u16 bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

static u16 narrow_half(float value) {
  _Float16 half = static_cast<_Float16>(value);
  u16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

static float widen_bfloat(u16 bits) { return float_of_bits(static_cast<u32>(bits) << 16); }

static u16 narrow_bfloat(float value) {
  const u32 bits = bits_of_float(value);
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

#if BF16
static float widen(u16 bits) { return widen_bfloat(bits); }
static u16 narrow(float value) { return narrow_bfloat(value); }
#else
static float widen(u16 bits) { return widen_half(bits); }
static u16 narrow(float value) { return narrow_half(value); }
#endif

static void store(void* y, i64 place, float value, int wide) {
  if (wide) static_cast<float*>(y)[place] = value;
  else static_cast<u16*>(y)[place] = narrow(value);
}

static u32 both(u16 low, u16 high) { return low | static_cast<u32>(high) << 16; }

static u32 subtract_half2(u32 a, u32 b) {
  return both(narrow_half(widen_half(a) - widen_half(b)), narrow_half(widen_half(a >> 16) - widen_half(b >> 16)));
}

static u32 fma_half2(u32 a, u32 b, u32 c) {
  return both(narrow_half(widen_half(a) * widen_half(b) + widen_half(c)),
              narrow_half(widen_half(a >> 16) * widen_half(b >> 16) + widen_half(c >> 16)));
}

static u32 fma_bfloat2(u32 a, u32 b, u32 c) {
  return both(narrow_bfloat(widen_bfloat(a) * widen_bfloat(b) + widen_bfloat(c)),
              narrow_bfloat(widen_bfloat(a >> 16) * widen_bfloat(b >> 16) + widen_bfloat(c >> 16)));
}

static u32 and_or(u32 value, u32 mask, u32 bits) { return (value & mask) | bits; }

static u32 permute(u32 a, u32 b, u32 selector) {
  u8 bytes[8];
  std::memcpy(bytes, &a, 4);
  std::memcpy(bytes + 4, &b, 4);
  u32 result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<u32>(bytes[(selector >> (4 * i)) & 7]) << (8 * i);
  return result;
}

// As PTX lays the operands out: a[g or g+8][2t, 2t+1 (+8)], b[2t, 2t+1 (+8)][g], c[g or g+8][2t, 2t+1].
static void mma_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  auto& slots = emulated::warp().slots;
  const int lane = emulated::lane(), g = lane / 4, t = lane % 4;
  std::memcpy(slots[lane], a, 16);
  slots[lane][4] = b0;
  slots[lane][5] = b1;
  emulated::meet();
  for (int i = 0; i < 4; i++) {
    const int row = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 16; k++) {
      const u32 left = slots[4 * g + (k % 8) / 2][row + 2 * (k / 8)], right = slots[4 * column + (k % 8) / 2][4 + k / 8];
      c[i] += widen(left >> (16 * (k % 2))) * widen(right >> (16 * (k % 2)));
    }
  }
  emulated::meet();
}

static void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  std::fill(c, c + 4, 0.0f);
  mma_add(c, a, b0, b1);
}

static float swap_lanes(float value, int mask) {
  auto& slots = emulated::warp().slots;
  slots[emulated::lane()][0] = bits_of_float(value);
  emulated::meet();
  const float result = float_of_bits(slots[emulated::lane() ^ mask][0]);
  emulated::meet();
  return result;
}

typedef u8* Shared;
static Shared shared_address(const void* pointer) { return static_cast<u8*>(const_cast<void*>(pointer)); }

static void copy16(Shared target, const void* source, bool live) {
  if (live) std::memcpy(target, source, 16);
  else std::memset(target, 0, 16);
}

static void copy4(Shared target, const void* source, bool live) {
  if (live) std::memcpy(target, source, 4);
  else std::memset(target, 0, 4);
}

static Quad load_once(const Quad* address) { return *address; }

static void commit() {}

static void start_next() {}
static void wait_for_previous() {}
static void take_turn() {}

template <int PENDING>
static void wait() {}

static float load_shared_by_blocks(const float* address) { return *address; }

struct alignas(16) Floats {
  float value[4];
};

static Floats load4_shared_by_blocks(const float* address) { return *reinterpret_cast<const Floats*>(address); }

static bool last_to_arrive(u32* counter, u32 members) {
  static u32 order;
  __syncthreads();
  if (threadIdx.x == 0) order = atomicAdd(counter, 1u);
  __syncthreads();
  if (order != members - 1) return false;
  if (threadIdx.x == 0) *counter = 0;
  return true;
}

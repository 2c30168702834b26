// The machine's instructions that the kernels use, each as one function. No header is included anywhere, so that NVRTC needs no files;
// the tests replace this file by one that computes the same on a CPU (tests/server/backends/torch_/kernels/emulator.h).
// BF16 (0 or 1) says whether 16-bit floats are bfloat16 or half.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

struct __align__(16) Quad {
  u32 word[4];
};

__device__ __forceinline__ u32 subtract_half2(u32 a, u32 b) {
  u32 r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

__device__ __forceinline__ u32 fma_half2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

__device__ __forceinline__ u32 fma_bfloat2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// (value & mask) | bits in one instruction, which the compiler does not find where both are constants.
__device__ __forceinline__ u32 and_or(u32 value, u32 mask, u32 bits) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(value), "r"(mask), "r"(bits));
  return r;
}

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
  return __byte_perm(a, b, selector);
}

#if BF16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
#endif

// c[16 x 8] += a[16 x 16] b[16 x 8], spread over a warp as PTX's mma.m16n8k16 has it.
__device__ __forceinline__ void mma_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm(MMA "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c = a b.
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm(MMA "{%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

typedef u32 Shared;  // an address in shared memory
__device__ __forceinline__ Shared shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// Asynchronous copies to shared memory; a dead one writes zeros and reads nothing.
__device__ __forceinline__ void copy16(Shared target, const void* source, bool live) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(live ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy4(Shared target, const void* source, bool live) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source), "r"(live ? 4 : 0) : "memory");
}

// 16 bytes that are read once: past the first-level cache, which keeps what is read again.
__device__ __forceinline__ Quad load_once(const Quad* address) {
  Quad r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.word[0]), "=r"(r.word[1]), "=r"(r.word[2]), "=r"(r.word[3])
               : "l"(address));
  return r;
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Launches overlap (driver.py): the next kernel may be started as soon as all blocks of this one have said so, and what the kernel
// before has written is there, and anything may be written, only after waiting. Weights, which no kernel writes, may be read before.
// Every kernel must do both.
__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void take_turn() {
  wait_for_previous();
  start_next();
}

// Read past the first-level cache: what other blocks wrote.
__device__ __forceinline__ float load_shared_by_blocks(const float* address) {
  float r;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(r) : "l"(address) : "memory");
  return r;
}

struct __align__(16) Floats {
  float value[4];
};

__device__ __forceinline__ Floats load4_shared_by_blocks(const float* address) {
  Floats r;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(r.value[0]), "=f"(r.value[1]), "=f"(r.value[2]), "=f"(r.value[3])
               : "l"(address)
               : "memory");
  return r;
}

__device__ __forceinline__ float float_of_bits(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 bits_of_float(float value) { return __float_as_uint(value); }

__device__ __forceinline__ float widen(u16 bits) {
#if BF16
  return __uint_as_float(static_cast<u32>(bits) << 16);
#else
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
#endif
}

__device__ __forceinline__ u16 narrow(float value) {
  u16 r;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(value));
#endif
  return r;
}

// A result: a float, or rounded to 16 bits.
__device__ __forceinline__ void store(void* y, i64 place, float value, int wide) {
  if (wide) static_cast<float*>(y)[place] = value;
  else static_cast<u16*>(y)[place] = narrow(value);
}

__device__ __forceinline__ float swap_lanes(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Whether this block is the last of `members` to come here; what the others wrote before is visible to it. The counter is left at zero
// for the next launch.
__device__ __forceinline__ bool last_to_arrive(u32* counter, u32 members) {
  __shared__ u32 order;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) order = atomicAdd(counter, 1u);
  __syncthreads();
  if (order != members - 1) return false;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  return true;
}

// What stands between the linear layers, each in one pass over its rows; compiled with BF16. Linear layers give float32, and so is the
// stream between the layers: a result is rounded once, where the next matrix or the pages of keys and values want 16 bits.

#define THREADS 256
#define WARPS (THREADS / 32)

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value += swap_lanes(value, mask);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value = fmaxf(value, swap_lanes(value, mask));
  return value;
}

// Over the block, to every thread.
template <bool MAX>
__device__ __forceinline__ float block_all(float value) {
  __shared__ float of_warp[WARPS];
  value = MAX ? warp_max(value) : warp_sum(value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  float all = of_warp[0];
  for (int i = 1; i < WARPS; i++) all = MAX ? fmaxf(all, of_warp[i]) : all + of_warp[i];
  return all;
}

struct __align__(16) Eight {
  u16 value[8];
};

struct __align__(32) EightFloats {
  float value[8];
};

__device__ __forceinline__ EightFloats load8(const float* x) { return *reinterpret_cast<const EightFloats*>(x); }
__device__ __forceinline__ EightFloats load8(const u16* x) {
  const Eight v = *reinterpret_cast<const Eight*>(x);
  EightFloats out;
#pragma unroll
  for (int j = 0; j < 8; j++) out.value[j] = widen(v.value[j]);
  return out;
}

// What transformers rounds before the weight is applied, if its rows are halves; float rows stay float until the end.
__device__ __forceinline__ float scaled(const u16*, float value) { return widen(narrow(value)); }
__device__ __forceinline__ float scaled(const float*, float value) { return value; }

template <typename Number>
__device__ __forceinline__ void rms(const Number* x, const u16* weight, u16* y, int width, float eps) {
  float squares = 0;
  for (int i = threadIdx.x * 8; i < width; i += THREADS * 8) {
    const EightFloats v = load8(x + i);
#pragma unroll
    for (int j = 0; j < 8; j++) squares += v.value[j] * v.value[j];
  }
  const float factor = rsqrtf(block_all<false>(squares) / width + eps);
  for (int i = threadIdx.x * 8; i < width; i += THREADS * 8) {
    const EightFloats v = load8(x + i), w = load8(weight + i);
    Eight out;
#pragma unroll
    for (int j = 0; j < 8; j++) out.value[j] = narrow(w.value[j] * scaled(x, v.value[j] * factor));
    *reinterpret_cast<Eight*>(y + i) = out;
  }
}

// One block a row; widths are multiples of 8.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(const u16* x, const u16* weight, u16* y, int width, float eps) {
  take_turn();
  const i64 row = static_cast<i64>(blockIdx.x) * width;
  rms(x + row, weight, y + row, width, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_wide(const float* x, const u16* weight, u16* y, int width, float eps) {
  take_turn();
  const i64 row = static_cast<i64>(blockIdx.x) * width;
  rms(x + row, weight, y + row, width, eps);
}

// sum = x + residual, y = norm(sum).
extern "C" __global__ void __launch_bounds__(THREADS) add_rms_norm(
    const float* x, const float* residual, const u16* weight, float* sum, u16* y, int width, float eps) {
  take_turn();
  const i64 row = static_cast<i64>(blockIdx.x) * width;
  for (int i = threadIdx.x * 8; i < width; i += THREADS * 8) {
    const EightFloats a = load8(x + row + i);
    EightFloats out = load8(residual + row + i);
#pragma unroll
    for (int j = 0; j < 8; j++) out.value[j] += a.value[j];
    *reinterpret_cast<EightFloats*>(sum + row + i) = out;  // read again below by this same thread
  }
  rms(sum + row, weight, y + row, width, eps);
}

// y = silu(gate) * up of rows [gate | up]; blockIdx.y counts rows.
extern "C" __global__ void __launch_bounds__(THREADS) silu_mul(const float* gate_up, u16* y, int inner) {
  take_turn();
  const i64 row = blockIdx.y;
  const int i = (blockIdx.x * THREADS + threadIdx.x) * 8;
  if (i >= inner) return;
  const EightFloats gate = load8(gate_up + row * 2 * inner + i), up = load8(gate_up + row * 2 * inner + inner + i);
  Eight out;
#pragma unroll
  for (int j = 0; j < 8; j++) out.value[j] = narrow(gate.value[j] / (1.0f + __expf(-gate.value[j])) * up.value[j]);
  *reinterpret_cast<Eight*>(y + row * inner + i) = out;
}

// Turns the query and key heads of rows [q | k | v] by cos and sin [rows, turned], as rotate_half does, writes keys and values to their
// places in the pages (none if negative) and the queries to `q`. One warp a head.
extern "C" __global__ void __launch_bounds__(THREADS) rope_and_store(
    const float* qkv, const float* cos, const float* sin, const i64* places, u16* q, u16* keys, u16* values, int heads, int kv_heads,
    int size, int turned) {
  take_turn();
  const int row = blockIdx.y, head = blockIdx.x * WARPS + threadIdx.x / 32, all = heads + 2 * kv_heads;
  if (head >= all) return;
  const float* source = qkv + (static_cast<i64>(row) * all + head) * size;
  const i64 place = places[row];
  u16* target;
  if (head < heads) target = q + (static_cast<i64>(row) * heads + head) * size;
  else if (place < 0) return;
  else if (head < heads + kv_heads) target = keys + (place * kv_heads + head - heads) * size;
  else target = values + (place * kv_heads + head - heads - kv_heads) * size;
  const int half = head < heads + kv_heads ? turned / 2 : 0;
  const float* c = cos + static_cast<i64>(row) * turned;
  const float* s = sin + static_cast<i64>(row) * turned;
  for (int i = threadIdx.x % 32; i < half; i += 32) {
    const float first = source[i], second = source[i + half];
    target[i] = narrow(first * c[i] - second * s[i]);
    target[i + half] = narrow(second * c[i + half] + first * s[i + half]);
  }
  for (int i = 2 * half + threadIdx.x % 32; i < size; i += 32) target[i] = narrow(source[i]);
}

// LLM.int8's activations: numbers below the threshold become multiples of the row's step, outliers stay.
extern "C" __global__ void __launch_bounds__(THREADS) round_rows(const u16* x, u16* y, int width, float threshold) {
  take_turn();
  const i64 row = static_cast<i64>(blockIdx.x) * width;
  float largest = 0;
  for (int i = threadIdx.x; i < width; i += THREADS) {
    const float value = fabsf(widen(x[row + i]));
    if (value < threshold) largest = fmaxf(largest, value);
  }
  largest = block_all<true>(largest);
  const float steps = largest > 0 ? 127.0f / largest : 0.0f;
  for (int i = threadIdx.x; i < width; i += THREADS) {
    const float value = widen(x[row + i]);
    y[row + i] = fabsf(value) < threshold ? narrow(rintf(value * steps) * (largest / 127.0f)) : x[row + i];
  }
}

// Rows of int8 and their scales: x = y * scales.
extern "C" __global__ void __launch_bounds__(THREADS) quantize_rows(const u16* x, signed char* y, float* scales, int width) {
  take_turn();
  const i64 row = static_cast<i64>(blockIdx.x) * width;
  float largest = 0;
  for (int i = threadIdx.x; i < width; i += THREADS) largest = fmaxf(largest, fabsf(widen(x[row + i])));
  largest = block_all<true>(largest);
  const float steps = largest > 0 ? 127.0f / largest : 0.0f;
  for (int i = threadIdx.x; i < width; i += THREADS) y[row + i] = static_cast<signed char>(rintf(widen(x[row + i]) * steps));
  if (threadIdx.x == 0) scales[blockIdx.x] = largest / 127.0f;
}

// y = sums * row scale * column scale + bias, of the int32 sums of a product of int8 matrices; in float where `wide` is not 0.
extern "C" __global__ void __launch_bounds__(THREADS) scale_sums(
    const int* sums, const float* row_scales, const float* column_scales, const u16* bias, void* y, int columns, int wide) {
  take_turn();
  const int column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= columns) return;
  const i64 place = static_cast<i64>(blockIdx.y) * columns + column;
  const float value = static_cast<float>(sums[place]) * (row_scales[blockIdx.y] * column_scales[column]);
  store(y, place, bias ? value + widen(bias[column]) : value, wide);
}

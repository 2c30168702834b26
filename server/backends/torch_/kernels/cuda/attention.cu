// One new token of each sequence against its keys and values in pages of 16 tokens; compiled with BF16.
//
// LANES lanes hold one token's head, 16 bytes each; a warp looks at 32 / LANES tokens at a time and keeps a running softmax for the GROUP
// query heads that share a key head. Blocks of one head (gridDim.x) take equal runs of pages; the last to finish joins their results in
// a fixed order. The grid depends on shapes alone, so that a captured graph serves every length.

#define THREADS 128
#define WARPS 4
#define PAGE 16
#define UNROLL 4      // tokens that a lane has in flight
#define FEWEST_PAGES 2  // for a block: less is not worth a block of its own

struct __align__(16) Eight {
  u16 value[8];
};

template <int GROUP>
struct Running {
  float largest[GROUP], total[GROUP], sum[GROUP][8];
};

// Joins two partial softmaxes. An empty one has total 0 and largest -infinity.
__device__ __forceinline__ float factor(float largest, float all) { return largest == all ? 1.0f : exp2f(largest - all); }

template <int LANES, int GROUP>
__device__ __forceinline__ void paged(
    const u16* q, const u16* keys, const u16* values, const int* tables, const int* lengths, u16* out, float* partial, u32* arrived,
    int heads, int kv_heads, int size, int table_width, int window, float scale, float softcap) {
  take_turn();
  constexpr int SLOTS = WARPS * 32 / LANES;
  const float log2e = 1.4426950408889634f, infinity = float_of_bits(0x7f800000u);
  const int row = blockIdx.z, ratio = heads / kv_heads, head_blocks = (ratio + GROUP - 1) / GROUP;
  const int kv_head = blockIdx.y / head_blocks, first_head = kv_head * ratio + blockIdx.y % head_blocks * GROUP;
  const int used = min(GROUP, ratio - static_cast<int>(blockIdx.y) % head_blocks * GROUP);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % LANES, slot = threadIdx.x / LANES;
  const bool holds = part * 8 < size;

  const int length = lengths[row], oldest = window > 0 ? max(0, length - window) : 0;
  const int first_page = oldest / PAGE, pages = (length + PAGE - 1) / PAGE - first_page;
  const int splits = gridDim.x, share = max((pages + splits - 1) / splits, FEWEST_PAGES);
  const int busy = length > 0 ? (pages + share - 1) / share : 1;
  if (static_cast<int>(blockIdx.x) >= busy) return;
  const int begin = max(oldest, (first_page + static_cast<int>(blockIdx.x) * share) * PAGE);
  const int end = min(length, (first_page + (static_cast<int>(blockIdx.x) + 1) * share) * PAGE);

  float query[GROUP][8];
  Running<GROUP> state;
#pragma unroll
  for (int h = 0; h < GROUP; h++) {
    state.largest[h] = -infinity;
    state.total[h] = 0;
    const bool live = holds && h < used;
    const Eight v = live ? *reinterpret_cast<const Eight*>(q + (static_cast<i64>(row) * heads + first_head + h) * size + part * 8) : Eight{};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      query[h][i] = widen(v.value[i]) * scale * (softcap > 0 ? 1.0f : log2e);
      state.sum[h][i] = 0;
    }
  }

  for (int base = begin; base < end; base += SLOTS * UNROLL) {
    Eight key[UNROLL], value[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int position = base + u * SLOTS + slot;
      const bool live = holds && position < end;
      const i64 token = live ? static_cast<i64>(tables[row * table_width + position / PAGE]) * PAGE + position % PAGE : 0;
      const i64 place = (token * kv_heads + kv_head) * size + part * 8;
      key[u] = live ? *reinterpret_cast<const Eight*>(keys + place) : Eight{};
      value[u] = live ? *reinterpret_cast<const Eight*>(values + place) : Eight{};
    }
    float score[UNROLL][GROUP];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
#pragma unroll
      for (int h = 0; h < GROUP; h++) score[u][h] = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float k = widen(key[u].value[i]);
#pragma unroll
        for (int h = 0; h < GROUP; h++) score[u][h] += query[h][i] * k;
      }
#pragma unroll
      for (int h = 0; h < GROUP; h++) {
#pragma unroll
        for (int mask = LANES / 2; mask; mask /= 2) score[u][h] += swap_lanes(score[u][h], mask);
        if (softcap > 0) score[u][h] = softcap * log2e * tanhf(score[u][h] / softcap);
        if (base + u * SLOTS + slot >= end) score[u][h] = -infinity;
      }
    }
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
      float largest = state.largest[h];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) largest = fmaxf(largest, score[u][h]);
      const float kept = factor(state.largest[h], largest);
      state.largest[h] = largest;
      state.total[h] *= kept;
#pragma unroll
      for (int i = 0; i < 8; i++) state.sum[h][i] *= kept;
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        const float weight = score[u][h] == -infinity ? 0.0f : exp2f(score[u][h] - largest);
        state.total[h] += weight;
#pragma unroll
        for (int i = 0; i < 8; i++) state.sum[h][i] += weight * widen(value[u].value[i]);
      }
    }
  }

  // Lanes of a warp that hold the same part, then the warps.
  __shared__ float joined[WARPS][GROUP][LANES * 8 + 2];
#pragma unroll
  for (int h = 0; h < GROUP; h++) {
#pragma unroll
    for (int mask = LANES; mask < 32; mask *= 2) {
      const float other = swap_lanes(state.largest[h], mask), largest = fmaxf(state.largest[h], other);
      const float mine = factor(state.largest[h], largest), theirs = factor(other, largest);
      state.largest[h] = largest;
      state.total[h] = state.total[h] * mine + swap_lanes(state.total[h], mask) * theirs;
#pragma unroll
      for (int i = 0; i < 8; i++) state.sum[h][i] = state.sum[h][i] * mine + swap_lanes(state.sum[h][i], mask) * theirs;
    }
    if (lane < LANES) {
#pragma unroll
      for (int i = 0; i < 8; i++) joined[warp][h][part * 8 + i] = state.sum[h][i];
      if (lane == 0) {
        joined[warp][h][LANES * 8] = state.largest[h];
        joined[warp][h][LANES * 8 + 1] = state.total[h];
      }
    }
  }
  __syncthreads();
  const int pitch = size + 2;
  const i64 group = static_cast<i64>(row) * gridDim.y + blockIdx.y;
  for (int j = threadIdx.x; j < used * size; j += THREADS) {
    const int h = j / size, i = j % size;
    float largest = -infinity, total = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, joined[w][h][LANES * 8]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float kept = factor(joined[w][h][LANES * 8], largest);
      total += joined[w][h][LANES * 8 + 1] * kept;
      sum += joined[w][h][i] * kept;
    }
    if (busy == 1) {
      out[(static_cast<i64>(row) * heads + first_head + h) * size + i] = narrow(total > 0 ? sum / total : 0.0f);
    } else {
      float* mine = partial + ((group * splits + blockIdx.x) * GROUP + h) * pitch;
      mine[i] = sum;
      if (i == 0) {
        mine[size] = largest;
        mine[size + 1] = total;
      }
    }
  }
  if (busy == 1) return;

  if (!last_to_arrive(arrived + group, busy)) return;
  // How much of each block's result counts, divided by the whole; the blocks' warps have no more use for `joined`.
  const float* all = partial + group * splits * GROUP * pitch;
  auto* shares = &joined[0][0][0];
  if (static_cast<int>(threadIdx.x) < used) {
    const int h = threadIdx.x;
    float largest = -infinity, total = 0;
    for (int s = 0; s < busy; s++) largest = fmaxf(largest, load_shared_by_blocks(all + (s * GROUP + h) * pitch + size));
    for (int s = 0; s < busy; s++) {
      const float* one = all + (s * GROUP + h) * pitch + size;
      const float kept = factor(load_shared_by_blocks(one), largest);
      total += load_shared_by_blocks(one + 1) * kept;
      shares[s * GROUP + h] = kept;
    }
    for (int s = 0; s < busy; s++) shares[s * GROUP + h] /= total;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < used * size; j += THREADS) {
    const int h = j / size, i = j % size;
    float sum = 0;
    for (int first = 0; first < busy; first += 8) {
      float part[8];  // all on their way before the first is added
#pragma unroll
      for (int s = 0; s < 8; s++) part[s] = load_shared_by_blocks(all + (min(first + s, busy - 1) * GROUP + h) * pitch + i);
#pragma unroll
      for (int s = 0; s < 8; s++) sum += first + s < busy ? part[s] * shares[(first + s) * GROUP + h] : 0.0f;
    }
    out[(static_cast<i64>(row) * heads + first_head + h) * size + i] = narrow(sum);
  }
}

#define PAGED(LANES, GROUP)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS) paged_##LANES##_##GROUP(                                                  \
      const u16* q, const u16* keys, const u16* values, const int* tables, const int* lengths, u16* out, float* partial,          \
      u32* arrived, int heads, int kv_heads, int size, int table_width, int window, float scale, float softcap) {                 \
    paged<LANES, GROUP>(q, keys, values, tables, lengths, out, partial, arrived, heads, kv_heads, size, table_width, window, scale, \
                        softcap);                                                                                                 \
  }

PAGED(8, 1)
PAGED(8, 2)
PAGED(8, 4)
PAGED(8, 8)
PAGED(16, 1)
PAGED(16, 2)
PAGED(16, 4)
PAGED(16, 8)
PAGED(32, 1)
PAGED(32, 2)
PAGED(32, 4)

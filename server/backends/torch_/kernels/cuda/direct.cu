// y = x weight^T as in linear.cu, for a few rows of x. What counts there is how many bytes of weights are on their way: each warp reads
// its own from memory to registers, AHEAD spans of 128 columns at once, and waits for no other warp until the sums are added.
//
// A block computes 16 rows of the weight for 8 * TILES rows of x: its 8 warps share the columns, and their sums are added in a fixed
// order.

#define WARPS 8
#define THREADS (32 * WARPS)
#define TILE_ROWS 16  // of the weight

// The weights of some spans in a lane's registers.
template <int AHEAD>
struct Ahead {
  Quad codes[AHEAD][SPAN][QUADS];
  u32 scales[AHEAD][SCALES][2];
};

// Where a warp's weights lie, and where they end.
struct Source {
  const Quad* codes;  // of this lane
  const u32* scales;
  int end, chunks, groups, shift;
};

template <int AHEAD>
__device__ __forceinline__ void fetch(Ahead<AHEAD>& to, const Source& from, int span) {
#pragma unroll
  for (int a = 0; a < AHEAD; a++) {
#pragma unroll
    for (int c = 0; c < SPAN; c++) {
      const int chunk = (span + a) * SPAN + c;
      const bool live = span + a < from.end && chunk < from.chunks;
#pragma unroll
      for (int q = 0; q < QUADS; q++)
        to.codes[a][c][q] = live ? load_once(from.codes + static_cast<i64>(chunk * QUADS + q) * 32) : Quad{};
    }
#pragma unroll
    for (int i = 0; i < SCALES; i++) {
      const int group = ((span + a) * SCALES + i) >> from.shift;
      const bool live = span + a < from.end && group < from.groups;
#pragma unroll
      for (int lower = 0; lower < 2; lower++) to.scales[a][i][lower] = live ? from.scales[group * TILE_ROWS + 8 * lower] : 0;
    }
  }
}

// What a lane multiplies with: of each tile its row's columns from 8t on, none if it lies beyond the batch.
template <int TILES>
struct Inputs {
  const u16* row[TILES];
  int columns;  // from 8t on
};

template <int TILES, int AHEAD>
__device__ __forceinline__ void multiply(float (&sums)[TILES][4], const Ahead<AHEAD>& weights, const Inputs<TILES>& x, int span, int end,
                                         const u32* book) {
#pragma unroll
  for (int a = 0; a < AHEAD; a++) {
    if (span + a >= end) break;
#pragma unroll
    for (int c = 0; c < SPAN; c++) {
      const int first = ((span + a) * SPAN + c) * CHUNK_COLUMNS;
      u32 words[4 * QUADS], scales[2][2], left[4][4];
      float scale[2][2];
#pragma unroll
      for (int i = 0; i < 4 * QUADS; i++) words[i] = weights.codes[a][c][i / 4].word[i % 4];
#pragma unroll
      for (int i = 0; i < 4; i++) scales[i / 2][i % 2] = weights.scales[a][(2 * c + i / 2) * SCALES / 4][i % 2];
      operands(left, scale, words, scales, book);
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        Quad b[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int column = first + 32 * half;
          b[half] = x.row[n] && column < x.columns ? *reinterpret_cast<const Quad*>(x.row[n] + column) : Quad{};
        }
        add_product(sums[n], left, scale, b);
      }
    }
  }
}

template <int TILES, int AHEAD>
__device__ __forceinline__ void direct(
    const u16* x, const Quad* codes, const u32* scales, const float* levels, const u16* bias, void* y, int batch, int rows, int columns,
    int chunks, int groups, int shift, int wide) {
  __shared__ u32 book[BOOK ? 256 : 1];
  __shared__ float of_warp[WARPS][8 * TILES][TILE_ROWS + 4];  // no two lanes in one bank
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const i64 tile = blockIdx.x;
  const int spans = (chunks + SPAN - 1) / SPAN;
  const Source from = {codes + tile * chunks * (32 * QUADS) + lane, scales + tile * groups * TILE_ROWS + g, spans * (warp + 1) / WARPS,
                       chunks, groups, shift};
  int span = spans * warp / WARPS;
  Ahead<AHEAD> weights;
  fetch(weights, from, span);
  fill_book(book, levels, threadIdx.x);
  if (BOOK) __syncthreads();
  wait_for_previous();  // which computes x
  float sums[TILES][4] = {};
  Inputs<TILES> inputs;
  inputs.columns = columns - 8 * t;
#pragma unroll
  for (int n = 0; n < TILES; n++) inputs.row[n] = 8 * n + g < batch ? x + static_cast<i64>(8 * n + g) * columns + 8 * t : nullptr;
#pragma unroll 1
  while (true) {
    multiply(sums, weights, inputs, span, from.end, book);
    span += AHEAD;
    if (span >= from.end) break;
    fetch(weights, from, span);
  }
  start_next();
#pragma unroll
  for (int i = 0; i < 4 * TILES; i++)
    of_warp[warp][8 * (i / 4) + 2 * t + i % 2][g + 8 * (i % 4 / 2)] = sums[i / 4][i % 4];
  __syncthreads();
  for (int i = threadIdx.x; i < TILE_ROWS * batch; i += THREADS) {
    const int row = blockIdx.x * TILE_ROWS + i % TILE_ROWS;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += of_warp[w][i / TILE_ROWS][i % TILE_ROWS];
    if (row < rows) store(y, static_cast<i64>(i / TILE_ROWS) * rows + row, bias ? sum + widen(bias[row]) : sum, wide);
  }
}

#define DIRECT(TILES, AHEAD)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS) direct_##TILES##_##AHEAD(                                                      \
      const u16* x, const Quad* codes, const u32* scales, const float* levels, const u16* bias, void* y, int batch, int rows,          \
      int columns, int chunks, int groups, int shift, int wide) {                                                                     \
    direct<TILES, AHEAD>(x, codes, scales, levels, bias, y, batch, rows, columns, chunks, groups, shift, wide);                       \
  }

DIRECT(1, 2)
DIRECT(1, 4)
DIRECT(2, 2)

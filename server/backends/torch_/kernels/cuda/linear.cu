// y[batch, rows] = x[batch, columns] weight[rows, columns]^T, weights of 4 or 8 bits: the left operand of mma.m16n8k16. y is of
// x's type, or float where `wide` is not 0.
//
// A block of 8 warps computes 16 * HEIGHT * ROW_WARPS rows for 8 * TILES columns of y^T (batch rows): a warp HEIGHT tiles of 16 rows,
// so that what it reads of x serves them all. Warps of the same rows share the columns of the weight, blocks of the same rows too
// (gridDim.y), and sums are added in a fixed order: equal inputs, equal bits.
// Weights, scales and activations come through a ring of shared memory filled by asynchronous copies; the ring's first weights while the
// kernel before still computes the activations.

#define WARPS 8
#define THREADS (32 * WARPS)

template <int TILES, int ROW_WARPS, int HEIGHT>
struct Shape {
  static constexpr int depth_warps = WARPS / ROW_WARPS;
  static constexpr int chunks = depth_warps * SPAN;  // that a block takes at a time
  static constexpr int rows = 16 * HEIGHT * ROW_WARPS;
  static constexpr int batch = 8 * TILES;
  static constexpr int stages = HEIGHT == 1 ? 4 : 3;
  static constexpr int pitch = rows + 4;  // of the sums in shared memory: no two lanes in one bank
};

template <int TILES, int ROW_WARPS, int HEIGHT>
struct __align__(16) Stage {
  Quad codes[WARPS][HEIGHT][SPAN][QUADS][32];
  Quad x[Shape<TILES, ROW_WARPS, HEIGHT>::chunks][8 * TILES][8];  // odd rows have their 64-byte halves swapped: no bank conflicts
  u32 scales[WARPS][HEIGHT][SCALES][16];
};

// What one thread copies of each slab, with everything that does not change worked out beforehand. A slab is Shape::chunks chunks.
template <int TILES, int ROW_WARPS, int HEIGHT>
struct Fetch {
  using S = Shape<TILES, ROW_WARPS, HEIGHT>;
  using T = Stage<TILES, ROW_WARPS, HEIGHT>;
  static constexpr int passes = (S::chunks * S::batch * 8 + THREADS - 1) / THREADS;  // pieces of x for a thread
  static constexpr int strides = S::batch > 32 ? S::batch / 32 : 1;                  // of which so many lie 32 rows apart

  const Quad* codes[HEIGHT];
  const u32* scales[HEIGHT];
  const u16* x[strides];
  bool row_inside[strides];
  Shared codes_to, scales_to, x_to;
  int chunk, chunks, span, groups, shift, column, columns;
  bool copies_x;

  __device__ __forceinline__ Fetch(const u16* x, const Quad* codes, const u32* scales, Shared stages, int tile, int tiles, int slab,
                                   int batch0, int batch, int columns, int chunks, int groups, int shift)
      : chunks(chunks), groups(groups), shift(shift), columns(columns) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    span = slab * S::depth_warps + warp / ROW_WARPS;
    chunk = span * SPAN;
#pragma unroll
    for (int h = 0; h < HEIGHT; h++) {
      const i64 mine = min(tile + h, tiles - 1);
      this->codes[h] = codes + (mine * chunks + chunk) * (32 * QUADS) + lane;
      this->scales[h] = scales + mine * groups * 16 + lane % 16;
    }
    codes_to = stages + (warp * HEIGHT * SPAN * QUADS * 32 + lane) * 16;
    scales_to = stages + sizeof(T::codes) + sizeof(T::x) + (warp * HEIGHT * SCALES * 16 + lane) * 4;
    const int piece = threadIdx.x % 8, row = (threadIdx.x / 8) % S::batch, part = threadIdx.x / 8 / S::batch;
    copies_x = threadIdx.x < S::chunks * S::batch * 8;
    column = (slab * S::chunks + part) * CHUNK_COLUMNS + piece * 8;
    x_to = stages + sizeof(T::codes) + ((part * S::batch + row) * 8 + (piece ^ ((row & 1) << 2))) * 16;
#pragma unroll
    for (int i = 0; i < strides; i++) {
      row_inside[i] = batch0 + row + 32 * i < batch;
      this->x[i] = x + static_cast<i64>(row_inside[i] ? batch0 + row + 32 * i : 0) * columns + column;
    }
  }

  // Start copying this slab's weights into the stage at this offset, and step to the next slab.
  __device__ __forceinline__ void weights(int offset, bool live) {
    const int left = live ? chunks - chunk : 0;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < HEIGHT; h++) {
#pragma unroll
      for (int i = 0; i < SPAN * QUADS; i++)
        copy16(codes_to + offset + 512 * (h * SPAN * QUADS + i), codes[h] + 32 * i, i / QUADS < left);
#pragma unroll
      for (int i = 0; i < (SCALES + 1) / 2; i++) {
        const int group = (span * SCALES + lane / 16 + 2 * i) >> shift;
        const bool live = left > 0 && group < groups;
        if (SCALES > 1 || lane < 16) copy4(scales_to + offset + 64 * h * SCALES + 128 * i, scales[h] + group * 16, live);
      }
      codes[h] += S::chunks * 32 * QUADS;
    }
    chunk += S::chunks;
    span += S::depth_warps;
  }

  // The same for the activations.
  __device__ __forceinline__ void inputs(int offset, bool live) {
    const int columns_left = live ? columns - column : 0;
#pragma unroll
    for (int i = 0; i < passes; i++) {
      const int part = strides > 1 ? i / strides : i * (32 / min(S::batch, 32));
      const bool inside = row_inside[i % strides] && part * CHUNK_COLUMNS < columns_left;
      if (copies_x) copy16(x_to + offset + i * THREADS * 16, x[i % strides] + part * CHUNK_COLUMNS, inside);
    }
    column += S::chunks * CHUNK_COLUMNS;
#pragma unroll
    for (int i = 0; i < strides; i++) x[i] += S::chunks * CHUNK_COLUMNS;
  }
};

// The weights of one chunk of a stage, as operands.
template <int TILES, int ROW_WARPS, int HEIGHT>
__device__ __forceinline__ void decode(u32 (&a)[4][4], float (&scale)[2][2], const Stage<TILES, ROW_WARPS, HEIGHT>& stage, int h, int s,
                                       const u32* book) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 words[4 * QUADS], scales[2][2];
#pragma unroll
  for (int q = 0; q < QUADS; q++) {
    const Quad quad = stage.codes[warp][h][s][q][lane];
#pragma unroll
    for (int i = 0; i < 4; i++) words[4 * q + i] = quad.word[i];
  }
#pragma unroll
  for (int i = 0; i < 4; i++) scales[i / 2][i % 2] = stage.scales[warp][h][(2 * s + i / 2) * SCALES / 4][lane / 4 + 8 * (i % 2)];
  operands(a, scale, words, scales, book);
}

template <int TILES, int ROW_WARPS, int HEIGHT>
__device__ __forceinline__ void multiply(float (&sums)[HEIGHT][TILES][4], const Stage<TILES, ROW_WARPS, HEIGHT>& stage, const u32* book) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int swap = (g & 1) << 2;
#pragma unroll
  for (int s = 0; s < SPAN; s++) {
    const auto& x = stage.x[(warp / ROW_WARPS) * SPAN + s];
    u32 a[HEIGHT][4][4];
    float scale[HEIGHT][2][2];
#pragma unroll
    for (int h = 0; h < HEIGHT; h++) decode(a[h], scale[h], stage, h, s, book);
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const Quad b[2] = {x[8 * n + g][t ^ swap], x[8 * n + g][(4 + t) ^ swap]};
#pragma unroll
      for (int h = 0; h < HEIGHT; h++) add_product(sums[h][n], a[h], scale[h], b);
    }
  }
}

// The sums of the block's warps, added, to `sums[row of x][row of weight]` in shared memory's first part.
template <int TILES, int ROW_WARPS, int HEIGHT>
__device__ __forceinline__ void spill(float* shared, const float (&sums)[HEIGHT][TILES][4]) {
  using S = Shape<TILES, ROW_WARPS, HEIGHT>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  float* mine = shared + (warp / ROW_WARPS) * S::batch * S::pitch + (warp % ROW_WARPS) * 16 * HEIGHT;
#pragma unroll
  for (int h = 0; h < HEIGHT; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) mine[(8 * n + 2 * t + i % 2) * S::pitch + 16 * h + g + 8 * (i / 2)] = sums[h][n][i];
}

template <int TILES, int ROW_WARPS, int HEIGHT>
__device__ __forceinline__ float gather(const float* shared, int row, int column) {
  using S = Shape<TILES, ROW_WARPS, HEIGHT>;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < S::depth_warps; w++) sum += shared[(w * S::batch + row) * S::pitch + column];
  return sum;
}

template <int TILES, int ROW_WARPS, int HEIGHT>
__device__ __forceinline__ void linear(
    const u16* x, const Quad* codes, const u32* scales, const float* levels, const u16* bias, void* y, float* partial,
    u32* arrived, int batch, int rows, int columns, int chunks, int groups, int shift, int wide) {
  using S = Shape<TILES, ROW_WARPS, HEIGHT>;
  DYNAMIC_SHARED(memory);
  __shared__ u32 book[BOOK ? 256 : 1];
  const int warp = threadIdx.x / 32, batch0 = blockIdx.z * S::batch;
  const int tile = (static_cast<int>(blockIdx.x) * ROW_WARPS + warp % ROW_WARPS) * HEIGHT, tiles = (rows + 15) / 16;
  const int slabs = (chunks + S::chunks - 1) / S::chunks;
  const int begin = static_cast<i64>(slabs) * blockIdx.y / gridDim.y;
  const int end = static_cast<i64>(slabs) * (blockIdx.y + 1) / gridDim.y;

  fill_book(book, levels, threadIdx.x);
  float sums[HEIGHT][TILES][4] = {};
  constexpr int stage_bytes = sizeof(Stage<TILES, ROW_WARPS, HEIGHT>);
  Fetch<TILES, ROW_WARPS, HEIGHT> fetch(x, codes, scales, shared_address(memory), tile, tiles, begin, batch0, batch, columns, chunks,
                                       groups, shift);
#pragma unroll
  for (int i = 0; i < S::stages - 1; i++) fetch.weights(i * stage_bytes, begin + i < end);
  wait_for_previous();  // which computes the activations
#pragma unroll
  for (int i = 0; i < S::stages - 1; i++) {
    fetch.inputs(i * stage_bytes, begin + i < end);
    commit();
  }
  int full = 0, empty = (S::stages - 1) * stage_bytes;
#pragma unroll 1
  for (int slab = begin; slab < end; slab++) {
    wait<S::stages - 2>();
    __syncthreads();
    fetch.weights(empty, slab + S::stages - 1 < end);
    fetch.inputs(empty, slab + S::stages - 1 < end);
    commit();
    multiply(sums, *reinterpret_cast<const Stage<TILES, ROW_WARPS, HEIGHT>*>(memory + full), book);
    empty = full;
    full = full == (S::stages - 1) * stage_bytes ? 0 : full + stage_bytes;
  }
  start_next();  // not before: blocks that wait beside working ones would be spread unevenly
  wait<0>();
  __syncthreads();
  auto* shared = reinterpret_cast<float*>(memory);
  spill<TILES, ROW_WARPS, HEIGHT>(shared, sums);
  __syncthreads();

  const int used = min(S::batch, batch - batch0), row0 = blockIdx.x * S::rows;
  if (gridDim.y == 1) {
    for (int i = threadIdx.x; i < S::rows * used; i += THREADS) {
      const float sum = gather<TILES, ROW_WARPS, HEIGHT>(shared, i / S::rows, i % S::rows);
      const int row = row0 + i % S::rows;
      if (row < rows) store(y, static_cast<i64>(batch0 + i / S::rows) * rows + row, bias ? sum + widen(bias[row]) : sum, wide);
    }
    return;
  }
  const i64 area = S::rows * S::batch;
  float* all = partial + static_cast<i64>(blockIdx.z * gridDim.x + blockIdx.x) * gridDim.y * area;
  for (int i = threadIdx.x; i < S::rows * used; i += THREADS)
    all[blockIdx.y * area + i] = gather<TILES, ROW_WARPS, HEIGHT>(shared, i / S::rows, i % S::rows);
  if (!last_to_arrive(arrived + blockIdx.z * gridDim.x + blockIdx.x, gridDim.y)) return;
  for (int i = threadIdx.x * 4; i < S::rows * used; i += THREADS * 4) {
    float sum[4] = {};
    for (int first = 0; first < static_cast<int>(gridDim.y); first += 4) {
      Floats part[4];  // all on their way before the first is added
#pragma unroll
      for (int j = 0; j < 4; j++) part[j] = load4_shared_by_blocks(all + min(first + j, static_cast<int>(gridDim.y) - 1) * area + i);
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) sum[k] += first + j < static_cast<int>(gridDim.y) ? part[j].value[k] : 0.0f;
    }
    const i64 place = static_cast<i64>(batch0 + i / S::rows) * rows;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int row = row0 + i % S::rows + k;
      if (row < rows) store(y, place + row, bias ? sum[k] + widen(bias[row]) : sum[k], wide);
    }
  }
}

#define LINEAR(TILES, ROW_WARPS, HEIGHT)                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS) linear_##TILES##_##ROW_WARPS##_##HEIGHT(                               \
      const u16* x, const Quad* codes, const u32* scales, const float* levels, const u16* bias, void* y, float* partial,        \
      u32* arrived, int batch, int rows, int columns, int chunks, int groups, int shift, int wide) {                           \
    linear<TILES, ROW_WARPS, HEIGHT>(x, codes, scales, levels, bias, y, partial, arrived, batch, rows, columns, chunks, groups, \
                                     shift, wide);                                                                             \
  }

LINEAR(1, 1, 1)
LINEAR(1, 2, 1)
LINEAR(1, 4, 1)
LINEAR(2, 2, 1)
LINEAR(2, 4, 1)
LINEAR(4, 4, 1)
LINEAR(4, 8, 1)
LINEAR(4, 4, 2)
LINEAR(8, 8, 1)
LINEAR(8, 4, 2)
LINEAR(8, 8, 2)

// weight[rows, columns] in 16 bits, for a matrix product of the library: one warp a chunk.
extern "C" __global__ void __launch_bounds__(THREADS) dequantize(
    const Quad* codes, const u32* scales, const float* levels, u16* weight, int rows, int columns, int chunks, int groups,
    int shift) {
  take_turn();
  __shared__ u32 book[BOOK ? 256 : 1];
  fill_book(book, levels, threadIdx.x);
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int chunk = blockIdx.x * WARPS + warp, tile = blockIdx.y;
  if (chunk >= chunks) return;
  u32 words[4 * QUADS];
#pragma unroll
  for (int q = 0; q < QUADS; q++) {
    const Quad quad = codes[(static_cast<i64>(tile) * chunks + chunk) * (32 * QUADS) + 32 * q + lane];
#pragma unroll
    for (int i = 0; i < 4; i++) words[4 * q + i] = quad.word[i];
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int group = ((2 * chunk + half) * SCALES / 4) >> shift;
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
      const int row = tile * 16 + g + 8 * lower, column = chunk * CHUNK_COLUMNS + 32 * half + 8 * t;
      if (row >= rows || column >= columns) continue;
      const u32 word = scales[(static_cast<i64>(tile) * groups + group) * 16 + g + 8 * lower];
      const float scale = scale_of(word);
      u32 pairs[4];
      Quad out;
      decode8(codes_of(words, lower, half), zero_of(word), book, pairs);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u16 even = narrow(scale * widen(pairs[i] & 0xffffu)), odd = narrow(scale * widen(pairs[i] >> 16));
        out.word[i] = even | static_cast<u32>(odd) << 16;
      }
      *reinterpret_cast<Quad*>(weight + static_cast<i64>(row) * columns + column) = out;
    }
  }
}

// Packed weights: how the codes of one chunk (16 rows x 64 columns) lie in a warp's registers, and how they become 16-bit floats.
// Compiled with BITS (4 or 8), BOOK (1: codes index a table of 16 floats), BF16, SCALES (scales in 128 columns of a row: 1, 2 or 4).
//
// Lane 4g + t (g < 8, t < 4) holds, of rows g and g + 8, the columns 8t..8t+7 and 32+8t..32+8t+7: 16 bytes of 4-bit codes, twice
// that of 8-bit codes. `layout.py` writes this order and describes it with a picture.

#define CHUNK_COLUMNS 64
#define QUADS (BITS / 4)  // 16-byte pieces that a lane holds of a chunk
#define SPAN 2            // chunks that share one set of scale words: 128 columns

// A scale word: a float whose low 8 bits are the zero point instead.
__device__ __forceinline__ float scale_of(u32 word) { return float_of_bits(word & 0xffffff00u); }

// The zero point, as the constants that the conversions below subtract.
struct Zero {
  u32 low, high;
};

__device__ __forceinline__ Zero zero_of(u32 word) {
  u32 zero = word & 0xffu;
#if BF16 && BITS == 8
  return {0x4b000000u | zero, 0};  // the float 2^23 + zero
#elif BF16
  return {(0xc300u | zero) * 0x10001u, 0};  // -(128 + zero), twice
#else
  return {(0x6400u + zero) * 0x10001u, (0xd400u + (zero << 4)) * 0x10001u};  // 1024 + zero; -(64 + zero)
#endif
}

// Eight codes to four pairs of (code - zero): exact, so that the scale can be applied to the sum.
#if BOOK
__device__ __forceinline__ void decode8(const u32* words, Zero, const u32* book, u32 (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) pairs[i] = book[(words[0] >> (8 * i)) & 0xffu];
}
#elif BITS == 4 && BF16
__device__ __forceinline__ void decode8(const u32* words, Zero zero, const u32*, u32 (&pairs)[4]) {
  // A code in the low bits of a bfloat16 between 128 and 255, whose steps are 1. Column 2i is nibble i, column 2i+1 nibble i+4.
#pragma unroll
  for (int i = 0; i < 4; i++) pairs[i] = fma_bfloat2(and_or(words[0] >> (4 * i), 0x000f000fu, 0x43004300u), 0x3f803f80u, zero.low);
}
#elif BITS == 4
__device__ __forceinline__ void decode8(const u32* words, Zero zero, const u32*, u32 (&pairs)[4]) {
  // A code in the low bits of a half between 1024 and 2047, whose steps are 1; four bits higher it counts sixteenfold.
#pragma unroll
  for (int i = 0; i < 2; i++) {
    u32 word = words[0] >> (8 * i);
    pairs[2 * i] = subtract_half2(and_or(word, 0x000f000fu, 0x64006400u), zero.low);
    pairs[2 * i + 1] = fma_half2(and_or(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, zero.high);
  }
}
#elif BF16
__device__ __forceinline__ void decode8(const u32* words, Zero zero, const u32*, u32 (&pairs)[4]) {
  // Through floats of 2^23 + code; the difference has at most 8 significant bits, so that its upper half is all of it.
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 word = words[i / 2];
    u32 even = permute(word, 0x4b000000u, 0x7440u + 2 * (i % 2));
    u32 odd = permute(word, 0x4b000000u, 0x7441u + 2 * (i % 2));
    float offset = float_of_bits(zero.low);
    pairs[i] = permute(bits_of_float(float_of_bits(even) - offset), bits_of_float(float_of_bits(odd) - offset), 0x7632u);
  }
}
#else
__device__ __forceinline__ void decode8(const u32* words, Zero zero, const u32*, u32 (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 halves = permute(words[i / 2], 0x64646464u, i % 2 ? 0x4342u : 0x4140u);
    pairs[i] = subtract_half2(halves, zero.low);
  }
}
#endif

// The codes of row g + 8 * lower, columns 32 * half + 8t..+7, as `decode8` wants them.
__device__ __forceinline__ const u32* codes_of(const u32 (&words)[4 * QUADS], int lower, int half) {
  return BITS == 4 ? &words[2 * lower + half] : &words[4 * half + 2 * lower];
}

// The weights of one chunk as operands of four steps of 16 columns, two for each half, and their scales, from their words by half and
// row (g or g + 8).
__device__ __forceinline__ void operands(u32 (&a)[4][4], float (&scale)[2][2], const u32 (&words)[4 * QUADS], const u32 (&scales)[2][2],
                                         const u32* book) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
      const u32 word = scales[half][lower];
      scale[half][lower] = scale_of(word);
      u32 pairs[4];
      decode8(codes_of(words, lower, half), zero_of(word), book, pairs);
#pragma unroll
      for (int i = 0; i < 4; i++) a[2 * half + i / 2][lower + 2 * (i % 2)] = pairs[i];
    }
  }
}

// sums += the chunk's product with b: 8 rows of x, of which lane 4g + t holds of row g the columns 8t..8t+7 and 32+8t..32+8t+7.
__device__ __forceinline__ void add_product(float (&sums)[4], const u32 (&a)[4][4], const float (&scale)[2][2], const Quad (&b)[2]) {
  float part[4];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (SCALES == 4 || half == 0) mma(part, a[2 * half], b[half].word[0], b[half].word[1]);
    else mma_add(part, a[2 * half], b[half].word[0], b[half].word[1]);
    mma_add(part, a[2 * half + 1], b[half].word[2], b[half].word[3]);
    if (SCALES == 4 || half == 1) {
#pragma unroll
      for (int i = 0; i < 4; i++) sums[i] += scale[half][i / 2] * part[i];
    }
  }
}

// A table of pairs for every byte of two codes.
__device__ __forceinline__ void fill_book(u32* pairs, const float* book, int thread) {
#if BOOK
  if (thread < 256) pairs[thread] = narrow(book[thread & 15]) | static_cast<u32>(narrow(book[thread >> 4])) << 16;
#endif
}

// Codes to a weight [n, k], and what finishes the product of an expanded one.
#pragma once
#include "common/epilogue.cuh"
#include "vq/kernel_sm80_words.cuh"

namespace vdit {

// A warp takes a tile of 32 x 64. Grid: x four tiles a block, in order of [n / 32, stride_out / 64].
template <class T, VqFormat kFormat>
struct VqDequantizeKernel {
  struct Params {
    VqDequantizeParams p;
    bool wide;  // rows of out start at multiples of 16 bytes
  };
  static constexpr int kThreads = 128, kMinBlocks = 1;
  static constexpr int kElements = kVqWords<kFormat> * kVqDim<kFormat>, kSmemBytes = kElements * sizeof(T);
  struct alignas(kVqDim<kFormat> * sizeof(T)) Word {
    T v[kVqDim<kFormat>];
  };

  VDIT_DEVICE void operator()(Params const& a, char* smem) const {
    VqDequantizeParams const& p = a.p;
    for (int i = thread_idx(); i < kElements; i += kThreads)
      reinterpret_cast<T*>(smem)[i] = static_cast<T const*>(p.codebook)[i];
    sync_block();
    int64_t const tiles_k = (p.k + 63) / 64, columns = (p.stride_out + 63) / 64;
    int64_t const tile = static_cast<int64_t>(block_idx_x()) * (kThreads / 32) + warp_idx();
    if (tile >= (p.n + 31) / 32 * columns) return;
    int64_t const n0 = tile / columns * 32, k0 = tile % columns * 64;
    LaneCodes<kFormat, 16> codes = {};
    if (k0 < p.k)
      codes.load(static_cast<char const*>(p.codes) + (n0 / 32 * tiles_k + k0 / 64) * kVqTileBytes<kFormat>);
    CUTE_UNROLL
    for (int sub = 0; sub < 4; ++sub) {
      // A lane has one code of each 16 neighbours of its row; after the swap it has the four codes of 16.
      int32_t four[4];
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) four[i] = codes.code(8 * (i / 2) + 2 * sub + i % 2);
      quad_transpose(four);
      store(p, a.wide, reinterpret_cast<Word const*>(smem), four, n0 + 8 * sub + lane_idx() / 4,
            k0 + 16 * (lane_idx() % 4));
    }
  }

  // 16 neighbours of row n from k0 on, those past k as 0.
  VDIT_DEVICE static void store(VqDequantizeParams const& p, bool wide, Word const* words,
                                int32_t const (&codes)[4], int64_t n, int64_t k0) {
    if (n >= p.n) return;
    alignas(16) T out[16];
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) {
      int const code = codes[i / 4];
      out[i] = kFormat == VqFormat::k256x4 ? words[code].v[i % 4 % kVqDim<kFormat>]
                                           : words[i % 4 < 2 ? code & 63 : code >> 6].v[i % 2];
    }
    if constexpr (!std::is_same<T, int8_t>::value) {
      if (p.row_scale != nullptr) {
        float const scale = p.row_scale[n];
        CUTE_UNROLL
        for (int i = 0; i < 16; ++i) out[i] = static_cast<T>(static_cast<float>(out[i]) * scale);
      }
    }
    T* const to = static_cast<T*>(p.out) + n * p.stride_out + k0;
    if (wide && k0 + 16 <= p.k) {
      CUTE_UNROLL
      for (int i = 0; i < static_cast<int>(sizeof(T)); ++i)
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<uint4 const*>(out)[i];
      return;
    }
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) {
      if (k0 + i < p.stride_out) to[i] = k0 + i < p.k ? out[i] : T(0);
    }
  }
};

// out = epilogue(product), the product in T. Grid: x one block for every kThreads groups of eight columns.
template <class T>
struct VqFinishKernel {
  struct Params {
    T const* product;  // [m, n] contiguous
    int64_t m, n;
    LinearEpilogue epilogue;
    bool wide;  // epilogue_is_wide, and so is the product
  };
  static constexpr int kThreads = 256, kMinBlocks = 1;

  VDIT_DEVICE void operator()(Params const& p, char*) const {
    int64_t const groups = (p.n + 7) / 8;
    int64_t const group = static_cast<int64_t>(block_idx_x()) * kThreads + thread_idx();
    int64_t const m = group / groups, n0 = group % groups * 8;
    if (m >= p.m) return;
    int const count = p.n - n0 < 8 ? static_cast<int>(p.n - n0) : 8;
    float sums[8];
    load8(p.product + m * p.n + n0, count, p.wide, sums);
    EpilogueColumns const columns(p.epilogue, n0, count, p.wide);
    store_outputs(p.epilogue, columns, m, p.n, n0, count, p.wide, sums);
  }
};

}  // namespace vdit

// Which tile block_sparse_attention gets on compute capability 8.0 and up: what was decided, apart from what
// was asked (the launch struct). Pure host code.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "vdit/attention.h"

namespace vdit {

struct AttentionTile {
  int head_dim;
  int block_m;    // query rows a thread block
  int block_n;    // key rows a step
  int stages;     // steps of keys and values in shared memory
  int warps;      // each owns block_m / warps query rows
  int blocks_sm;  // thread blocks that share an SM of an A100, by shared memory and registers

  constexpr int threads() const { return warps * 32; }
  constexpr int smem_bytes() const { return (block_m + 2 * stages * block_n) * head_dim * 2; }

  std::string to_string() const {
    return "block_sparse_attention sm80: " + std::to_string(block_m) + " x " + std::to_string(block_n) +
           " tile, head_dim " + std::to_string(head_dim) + ", " + std::to_string(stages) + " stages, " +
           std::to_string(warps) + " warps, " + std::to_string(smem_bytes()) + " bytes of shared memory";
  }
};

// Every tile stays within 64 KB, so that the GPUs with 99 KB an SM (compute capability 8.6, 8.9, 12.0) run
// it. NOTE: for head sizes 96 and 128 a step is 32 keys, not 64: with both stages of keys and values resident
// that leaves room for a second thread block, and the 32 fewer score registers keep 128 x 128 outputs from
// spilling.
constexpr AttentionTile attention_tile(int head_dim, int block_m) {
  return AttentionTile{head_dim, block_m, head_dim == 64 ? 64 : 32, 2, 4, block_m == 128 ? 2 : 3};
}

// Throws std::runtime_error with one sentence.
inline void check_cuda_head_dim(int head_dim, char const* op = "block_sparse_attention") {
  if (head_dim == 64 || head_dim == 96 || head_dim == 128) return;
  throw std::runtime_error(std::string("vdit::") + op + ": head_dim must be 64, 96 or 128, got " +
                           std::to_string(head_dim) + ".");
}

// 128-row tiles read each key half as often from shared memory and L2; 64-row tiles pad short query blocks
// less. A padded row costs as much as a real one, and a row of a 64-row tile some 1.25 times as much.
// NOTE: 1.25 is an estimate from the traffic, not measured.
inline AttentionTile pick_tile(BlockSparseAttentionParams const& p) {
  check_cuda_head_dim(p.head_dim);
  double rows_64, rows_128;  // executed a query block
  if (p.q_offsets != nullptr) {
    double const mean =
        p.num_q_blocks > 0 ? static_cast<double>(p.seqlen_q) / static_cast<double>(p.num_q_blocks) : 0;
    rows_64 = mean + 32, rows_128 = mean + 64;
  } else {
    int64_t const block = p.q_block_size < p.seqlen_q ? p.q_block_size : p.seqlen_q;
    rows_64 = static_cast<double>((block + 63) / 64 * 64),
    rows_128 = static_cast<double>((block + 127) / 128 * 128);
  }
  return attention_tile(p.head_dim, rows_128 <= 1.25 * rows_64 ? 128 : 64);
}

// The tile on compute capability 9.0: consumer warpgroups of 64 query rows, and a producer warpgroup.
struct AttentionTileSm90 {
  int head_dim;
  int consumers;
  int block_n;             // key rows a step
  int stages;              // steps of keys and values in shared memory
  int consumer_registers;  // a thread
  int producer_registers;

  constexpr int block_m() const { return 64 * consumers; }
  constexpr int threads() const { return 128 * (consumers + 1); }
  constexpr int row_bytes() const { return (head_dim + 63) / 64 * 128; }  // padded to whole swizzles
  constexpr int smem_bytes() const { return (block_m() + 2 * stages * block_n) * row_bytes() + 1024; }

  std::string to_string() const {
    return "block_sparse_attention sm90: " + std::to_string(block_m()) + " x " + std::to_string(block_n) +
           " tile, head_dim " + std::to_string(head_dim) + ", " + std::to_string(stages) + " stages, " +
           std::to_string(consumers) + " consumer warpgroups, " + std::to_string(smem_bytes()) +
           " bytes of shared memory";
  }
};

// NOTE: a query tile of m rows does m products a byte of keys that comes from L2, whose bandwidth m = 64
// exhausts. Three consumers leave 152 registers a thread beside a producer that needs 56: enough for outputs
// of head size 64 and scores of 112 keys.
constexpr AttentionTileSm90 attention_tile_sm90(int head_dim) {
  return head_dim == 64 ? AttentionTileSm90{64, 3, 112, 5, 152, 56}
                        : AttentionTileSm90{head_dim, 2, 128, 3, 224, 56};
}

// Tiles of block_m query rows that a head has, at most: a tile holds rows of one query block.
inline int64_t max_query_tiles(BlockSparseAttentionParams const& p, int block_m) {
  if (p.q_offsets != nullptr) return p.seqlen_q / block_m + p.num_q_blocks + 1;
  return p.num_q_blocks * ((p.q_block_size + block_m - 1) / block_m);
}

}  // namespace vdit

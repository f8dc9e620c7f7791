// Launchers of kernel_sm80_select.cuh.
#include "attention/kernel_sm80_select.cuh"
#include "common/launch_util.cuh"

namespace vdit {
namespace {

int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Where the parts of the per-head workspace lie, in bytes.
struct TopkWorkspace {
  int64_t cuts, histograms, row_ties, bytes;
};

TopkWorkspace topk_workspace(TopkBlocksParams const& p) {
  int64_t const maps = p.batch * p.heads;
  TopkWorkspace at{};
  at.histograms = round_up(maps * static_cast<int64_t>(sizeof(Cut)));
  at.row_ties = at.histograms + round_up(maps * 3 * Radix::kBins * 4);
  at.bytes = at.row_ties + round_up(maps * p.num_q_blocks * 4);
  return at;
}

size_t cache_bytes(int64_t cached) {
  return static_cast<size_t>(RowSelect::kWarps * cached) * sizeof(uint32_t);
}

void topk_per_head(TopkBlocksLaunch launch_params, void* workspace, void* stream) {
  TopkBlocksParams const& p = launch_params.topk;
  if (p.num_q_blocks * p.num_kv_blocks > UINT32_MAX) {
    throw std::runtime_error("vdit::topk_blocks: a map may have at most 4294967295 entries, got " +
                             std::to_string(p.num_q_blocks) + " x " + std::to_string(p.num_kv_blocks) + ".");
  }
  TopkWorkspace const at = topk_workspace(p);
  char* base = static_cast<char*>(workspace);
  launch_params.cuts = reinterpret_cast<Cut*>(base + at.cuts);
  launch_params.histograms = reinterpret_cast<uint32_t*>(base + at.histograms);
  launch_params.row_ties = reinterpret_cast<uint32_t*>(base + at.row_ties);
  // A block should see some ten times as many keys as it has bins to hand over.
  launch_params.rows_per_block = 16 * Radix::kBins / p.num_kv_blocks + 1;

  Grid const map_grid{p.batch * p.heads, 1, 1};
  Grid const row_grid{ceil_div(p.num_q_blocks, RowSelect::kWarps), p.heads, p.batch};
  Grid const tile_grid{ceil_div(p.num_q_blocks, launch_params.rows_per_block), p.heads, p.batch};
  launch<TopkBeginKernel>(map_grid, 0, stream, launch_params);
  for (launch_params.pass = 0; launch_params.pass < 3; ++launch_params.pass) {
    launch<TopkHistogramKernel>(tile_grid, TopkHistogramKernel::kSmemBytes, stream, launch_params);
    launch<TopkDigitKernel>(map_grid, 0, stream, launch_params);
  }
  launch<TopkTiesKernel>(row_grid, 0, stream, launch_params);
  launch<TopkListsKernel>(row_grid, 0, stream, launch_params);
}

}  // namespace

int64_t topk_blocks_workspace_bytes(TopkBlocksParams const& p) {
  return p.per_head ? topk_workspace(p).bytes : 0;
}

void run_topk_blocks_sm80(TopkBlocksParams const& p, void* workspace, void* stream) {
  TopkBlocksLaunch launch_params{};
  launch_params.topk = p;
  // A map of nothing still has its counts to be written, which the row kernel does.
  if (p.per_head && p.num_kv_blocks > 0) return topk_per_head(launch_params, workspace, stream);
  launch_params.cached = RowSelect::cached(p.num_kv_blocks);
  Grid const grid{ceil_div(p.num_q_blocks, RowSelect::kWarps), p.heads, p.batch};
  launch<TopkRowsKernel>(grid, cache_bytes(launch_params.cached), stream, launch_params);
}

int64_t topp_blocks_workspace_bytes(ToppBlocksParams const&) { return 0; }

void run_topp_blocks_sm80(ToppBlocksParams const& p, void* /*workspace*/, void* stream) {
  ToppBlocksLaunch const launch_params{p, RowSelect::cached(p.num_kv_blocks)};
  Grid const grid{ceil_div(p.num_q_blocks, RowSelect::kWarps), p.heads, p.batch};
  launch<ToppRowsKernel>(grid, cache_bytes(launch_params.cached), stream, launch_params);
}

}  // namespace vdit

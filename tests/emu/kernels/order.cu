// The items into which block_sparse_attention for sm90 cuts its work, printed one a line: "row0 rows q_block"
// of each part. Arguments: offsets or "uniform:<block>:<length>", list lengths (a last "d" names a block
// twice), and rows of a tile (128 or 192).
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "common/launch_util.cuh"
#include "attention/workspace_sm90.h"

namespace {

std::vector<std::string> split(std::string const& text, char at) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, at);) parts.push_back(part);
  return parts;
}

template <int kBlockM>
void print_items(vdit::BlockSparseAttentionParams const& p) {
  using namespace vdit;
  using namespace vdit::sm90;
  using Order = OrderItemsKernel<kBlockM>;
  // Twice what is asked for, and full: what is written past the end, or not written at all, is seen.
  int64_t const bytes = divide_workspace(p, kBlockM, nullptr).bytes;
  std::vector<uint8_t> memory(2 * bytes, 0xAA);
  Workspace const space = divide_workspace(p, kBlockM, memory.data());
  if (space.bits.words != nullptr) {
    launch<ListBitsKernel>(Grid{ceil_div(p.num_q_blocks, ListBitsKernel::kWarps), 1, 1},
                           ListBitsKernel::smem_bytes(space.bits.row_words), nullptr, {p, space.bits});
  }
  launch<Order>(Grid{1, 1, 1}, Order::smem_bytes(), nullptr,
                {p, space.bits, space.items, space.shorts, space.next_item, space.items_head});
  for (int64_t i = bytes; i < 2 * bytes; ++i) {
    if (memory[i] != 0xAA) printf("byte %lld past the end was written\n", static_cast<long long>(i - bytes));
  }
  printf("next %d\n", *space.next_item);
  for (int64_t i = 0; i < space.items_head; ++i) {
    WorkPart const& a = space.items[i].part[0];
    WorkPart const& b = space.items[i].part[1];
    if (b.rows > 0) {
      printf("%d %d %d %d %d %d\n", a.row0, a.rows, a.q_block, b.row0, b.rows, b.q_block);
    } else if (a.rows > 0) {
      printf("%d %d %d\n", a.row0, a.rows, a.q_block);
    } else {
      printf("none\n");
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  vdit::BlockSparseAttentionParams p;
  p.batch = p.heads = 1;
  std::vector<int32_t> offsets, counts, lists;
  std::vector<std::string> const sizes = split(arguments[1], ':');
  if (sizes[0] == "uniform") {
    p.q_block_size = std::stoi(sizes[1]);
    p.seqlen_q = std::stoi(sizes[2]);
    p.num_q_blocks = (p.seqlen_q + p.q_block_size - 1) / p.q_block_size;
  } else {
    for (std::string const& text : split(arguments[1], ',')) offsets.push_back(std::stoi(text));
    p.seqlen_q = std::stoi(arguments[4]);
    p.num_q_blocks = static_cast<int64_t>(offsets.size()) - 1;
    p.q_offsets = offsets.data();
  }
  p.list_width = 40;
  p.num_kv_blocks = 70;
  p.seqlen_kv = 700;
  p.kv_block_size = 10;
  for (std::string const& text : split(arguments[2], ',')) {
    counts.push_back(std::stoi(text));
    for (int i = 0; i < p.list_width; ++i) lists.push_back(i == 1 && text.back() == 'd' ? 0 : i);
  }
  p.kv_num_blocks = counts.data();
  p.kv_indices = lists.data();
  p.stride_num_blocks.s = 1;
  p.stride_indices.s = p.list_width;
  std::stoi(arguments[3]) == 128 ? print_items<128>(p) : print_items<192>(p);
}

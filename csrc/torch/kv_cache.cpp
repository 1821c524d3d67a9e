#include <algorithm>

#include "elementwise/copy_blocks.h"
#include "torch/checks.h"

namespace fastattn {
namespace {

using Tensors = std::vector<Tensor>;

// CTAs of a swap. PCIe is full with a few hundred kilobytes on their way, and 16 CTAs hold 256: the rest of the GPU is
// left to what runs beside.
constexpr int kSwapCtas = 16;

// A cache (num_blocks, block_size, [rows,] width): its strides in bytes, 0 of a dimension that has one element at most.
BlockStrides strides_of(const Tensor& t) {
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  const auto stride = [&](int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) * bytes : 0; };
  return {stride(0), stride(1), t.dim() == 4 ? stride(2) : 0};
}

// A list of caches. What is said of one is put together only when it is wrong: there are hundreds.
class CacheList {
 public:
  CacheList(const Checks& checks, const char* name, const Tensors& caches, int32_t device_index)
      : checks_(checks), name_(name), caches_(caches) {
    for (size_t i = 0; i < caches.size(); ++i) {
      const Tensor& t = caches[i];
      if (t.dim() != 3 && t.dim() != 4) fail(i, "has another shape than (num_blocks, block_size, [Hk,] D)");
      if (t.size(0) != caches[0].size(0) || t.size(1) != caches[0].size(1)) fail(i, "has other blocks than the first");
      if (t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1) fail(i, "is not contiguous in its last dimension");
      if (t.is_cuda() && t.get_device_index() != device_index) fail(i, "is not on block_mapping's device");
      const int64_t most = std::max(t.size(0), t.size(0) > 0 ? t.numel() / t.size(0) * bytes(i) : 0);
      if (most > INT32_MAX) fail(i, "has 2^31 blocks, or bytes in a block, or more");
    }
  }

  const Tensor& operator[](size_t i) const { return caches_[i]; }
  int64_t bytes(size_t i) const { return static_cast<int64_t>(caches_[i].element_size()); }

  // Where the kernel finds the memory: on the device, or on the host if it is pinned.
  void* address(size_t i) const {
    if (caches_[i].is_cuda()) return caches_[i].data_ptr();
    cudaPointerAttributes attributes = {};
    check_launch(name_, cudaPointerGetAttributes(&attributes, caches_[i].data_ptr()));
    if (attributes.type != cudaMemoryTypeHost) fail(i, "is not on a CUDA device nor in pinned memory");
    return attributes.devicePointer;
  }

  void fail(size_t i, const char* what) const {
    checks_.that(false, std::string(name_) + "[" + std::to_string(i) + "] " + what);
  }

 private:
  const Checks& checks_;
  const char* name_;
  const Tensors& caches_;
};

// Copies from sources to targets, which have the same shapes but for their numbers of blocks.
void copy(const char* op, const char* sources_name, const Tensors& source_list, const char* targets_name,
          const Tensors& target_list, const Tensor& block_mapping, const MaybeTensor& num_tokens, int max_ctas) {
  const Checks checks(op, "block_mapping", block_mapping);
  checks.shape("block_mapping", block_mapping, {kAny, 2}).dtype("block_mapping", block_mapping, {ScalarType::Int});
  const int64_t num_pairs = block_mapping.size(0);
  if (num_tokens) {
    checks.shape("num_tokens", *num_tokens, {num_pairs}).dtype("num_tokens", *num_tokens, {ScalarType::Int});
  }
  const CacheList sources(checks, sources_name, source_list, block_mapping.get_device_index());
  const CacheList targets(checks, targets_name, target_list, block_mapping.get_device_index());
  checks.that(source_list.size() == target_list.size(), std::string(targets_name) + " are " +
                                                            std::to_string(target_list.size()) + " caches, expected " +
                                                            std::to_string(source_list.size()));

  const OnDeviceOf guard(block_mapping);
  CopyBlocksParams p;
  p.caches.reserve(source_list.size());
  for (size_t i = 0; i < source_list.size(); ++i) {
    const Tensor &source = sources[i], &target = targets[i];
    std::vector<int64_t> shape = shape_of(source);
    shape[0] = target.size(0);
    if (shape != shape_of(target) || source.scalar_type() != target.scalar_type()) {
      targets.fail(i, "has another shape or dtype than what is copied to it");
    }
    if (source.numel() == 0 || target.numel() == 0) continue;
    BlockCopy cache;
    cache.source = sources.address(i);
    cache.target = targets.address(i);
    cache.source_strides = strides_of(source);
    cache.target_strides = strides_of(target);
    cache.num_rows = source.dim() == 4 ? static_cast<int32_t>(source.size(2)) : 1;
    cache.row_bytes = static_cast<int32_t>(source.size(source.dim() - 1) * sources.bytes(i));
    p.caches.push_back(cache);
  }
  if (num_pairs == 0 || p.caches.empty()) return;
  p.block_mapping = data<int32_t>(block_mapping);
  p.mapping_stride = block_mapping.stride(0);
  p.num_tokens = num_tokens ? data<int32_t>(*num_tokens) : nullptr;
  p.num_pairs = num_pairs;
  p.num_source_blocks = static_cast<int32_t>(sources[0].size(0));
  p.num_target_blocks = static_cast<int32_t>(targets[0].size(0));
  p.block_size = static_cast<int32_t>(sources[0].size(1));
  p.max_ctas = max_ctas;
  check_launch(op, copy_blocks(p, stream_of(block_mapping)));
}

void copy_blocks_op(const Tensors& caches, const Tensor& block_mapping, const MaybeTensor& num_tokens) {
  copy("copy_blocks", "caches", caches, "caches", caches, block_mapping, num_tokens, INT32_MAX);
}

void swap_blocks_op(const Tensors& sources, const Tensors& destinations, const Tensor& block_mapping) {
  copy("swap_blocks", "sources", sources, "destinations", destinations, block_mapping, std::nullopt, kSwapCtas);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks_op));
  m.impl("swap_blocks", TORCH_BOX(&swap_blocks_op));
}

}  // namespace fastattn

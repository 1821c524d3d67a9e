// Transaction barriers and the copies that complete them, and those of cp.async: compiled once for all kernels.
#include "arch/cp_async.cuh"
#include "arch/tma.cuh"
#include "tensor_map.h"

namespace fastattn {

// ---------------------------------------------------------------------------------------------
// Barriers

void MBarrier::arrive_at_cta(uint32_t rank) {
  emulator::require_running(static_cast<int>(rank));
  of_cta(static_cast<int>(rank)).arrive();
}

void MBarrier::store_bytes_at_cta(int rank, void* target, const void* value, size_t num_bytes) {
  const auto* const begin = static_cast<const unsigned char*>(value);
  emulator::cta.pending.push_back([&barrier = of_cta(rank), rank,
                                   address = emulator::smem_of(rank) + shared_address(target),
                                   bytes = std::vector<unsigned char>(begin, begin + num_bytes)] {
    emulator::require_running(rank);
    std::memcpy(address, bytes.data(), bytes.size());
    barrier.complete_bytes(static_cast<uint32_t>(bytes.size()));
  });
}

void MBarrier::arrive_expect_bytes(uint32_t num_bytes) {
  num_bytes_expected += static_cast<int32_t>(num_bytes);
  if (--num_missing < 0) emulator::fail("an arrival too many: " + text());
  end_phase();
}

void MBarrier::complete_bytes(uint32_t num_bytes) {
  if (phase > 1) emulator::fail("bytes for a barrier that was not initialized: " + text());
  num_bytes_expected -= static_cast<int32_t>(num_bytes);
  end_phase();
}

void MBarrier::wait(uint32_t parity) {
  struct PhaseIsOver final : emulator::Condition {
    const MBarrier& barrier;
    uint32_t parity;
    PhaseIsOver(const MBarrier& b, uint32_t p) : barrier(b), parity(p) {}
    bool holds() const override { return barrier.phase != parity; }
    std::string text() const override { return barrier.text() + ", its phase " + std::to_string(parity); }
  };
  if (phase > 1) emulator::fail("a wait at a barrier that was not initialized: " + text());
  emulator::wait(PhaseIsOver(*this, parity));
}

void MBarrier::end_phase() {
  if (num_missing > 0 || num_bytes_expected != 0) return;
  phase ^= 1;
  num_missing = num_arrivals;
}

std::string MBarrier::text() const {
  const int64_t address = reinterpret_cast<const unsigned char*>(this) - smem_bytes;
  return "the barrier at byte " + std::to_string(address % emulator::kMaxSmemBytes) + " (" +
         std::to_string(num_missing) + " of " + std::to_string(num_arrivals) + " arrivals and " +
         std::to_string(num_bytes_expected) + " bytes missing)";
}

// ---------------------------------------------------------------------------------------------
// The copy engine

namespace {

// The box that begins at these elements, as many as the map has dimensions.
void load_box(void* destination, const CUtensorMap& map, MBarrier& barrier, std::array<int32_t, 5> first,
              int rank_of_map, uint16_t cta_mask) {
  const emulator::TensorMap tensor = emulator::read_tensor_map(map);
  if (tensor.rank != rank_of_map) emulator::fail("a copy that names more or fewer dimensions than its map has");
  const uint32_t target = shared_address(destination);
  const int row_bytes = tensor.box[0] * tensor.element_bytes, num_rows = tensor.num_rows();
  const int num_bytes = row_bytes * num_rows;
  // With a swizzle, fewer rows than it repeats after would begin in its middle.
  const bool swizzled = row_bytes == 128 || row_bytes == 64;
  if (target % (swizzled ? 8 * row_bytes : 128) != 0)
    emulator::fail("a box at byte " + std::to_string(target) + ", not aligned");
  for (int rank = 0; rank < 16; ++rank) {
    if ((cta_mask >> rank & 1) == 0) continue;
    if (rank >= emulator::cta.cluster_size) emulator::fail("a copy to a CTA that is not in the cluster");
    unsigned char* const smem = emulator::smem_of(rank);
    std::memset(smem + target, 0xff, num_bytes);
    emulator::cta.pending.push_back([=, &its_barrier = barrier.of_cta(rank)] {
      emulator::require_running(rank);
      std::vector<unsigned char> bytes(row_bytes);
      for (int row = 0; row < num_rows; ++row) {
        tensor.read_row(first, row, bytes.data());
        for (int begin = 0; begin < row_bytes; begin += 16) {  // what a swizzle keeps together
          std::memcpy(smem + emulator::swizzle(target + row * row_bytes + begin, row_bytes), &bytes[begin], 16);
        }
      }
      its_barrier.complete_bytes(num_bytes);
    });
  }
}

}  // namespace

void tma_load_4d_multicast(void* destination, const CUtensorMap& map, MBarrier& barrier, int32_t x, int32_t y,
                           int32_t z, int32_t w, uint16_t cta_mask) {
  load_box(destination, map, barrier, {x, y, z, w, 0}, 4, cta_mask);
}

void tma_load_whole_rows(void* destination, const CUtensorMap& map, MBarrier& barrier, int32_t row, int32_t z,
                         int32_t w) {
  load_box(destination, map, barrier, {0, row, 0, z, w}, 5, static_cast<uint16_t>(1u << emulator::this_rank()));
}

void tma_load_bytes(void* destination, const void* source, MBarrier& barrier, uint32_t num_bytes, uint64_t) {
  const uint32_t target = shared_address(destination);
  if (target % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0 || num_bytes % 16 != 0) {
    emulator::fail("bytes from or to an address that is not a multiple of 16, or not a multiple of 16 of them");
  }
  std::memset(destination, 0xff, num_bytes);
  unsigned char* const smem = emulator::smem_of(emulator::this_rank());
  emulator::cta.pending.push_back([=, &barrier] {
    std::memcpy(smem + target, source, num_bytes);
    barrier.complete_bytes(num_bytes);
  });
}

void tma_prefetch_bytes(const void* source, uint32_t num_bytes, uint64_t) {
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0 || num_bytes % 16 != 0) {
    emulator::fail("bytes from an address that is not a multiple of 16, or not a multiple of 16 of them");
  }
}

}  // namespace fastattn

namespace emulator {

// ---------------------------------------------------------------------------------------------
// cp.async

namespace {

struct AsyncCopy {
  void* destination;
  const void* source;
  size_t num_bytes;
  bool valid;

  void complete() const {
    if (valid) {
      std::memcpy(destination, source, num_bytes);
    } else {
      std::memset(destination, 0, num_bytes);
    }
  }
};

WorkInGroups<AsyncCopy> async_copies("copies");

}  // namespace

void copy(void* destination, const void* source, size_t num_bytes, bool valid) {
  if (fastattn::shared_address(destination) % num_bytes != 0 || reinterpret_cast<uintptr_t>(source) % num_bytes != 0) {
    fail("cp.async from or to an address that is not a multiple of " + std::to_string(num_bytes));
  }
  std::memset(destination, 0xff, num_bytes);
  async_copies.add({destination, source, num_bytes, valid});
}

void commit_copies() { async_copies.commit(); }

void wait_for_copies(size_t num_pending) {
  auto& groups = async_copies.of_this_thread().groups;
  for (; groups.size() > num_pending; groups.pop_front()) {
    for (const AsyncCopy& copy : groups.front()) copy.complete();
  }
}

}  // namespace emulator

// Python bindings of the host runtime: fastattn._runtime. No logic here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention/flash_bwd_sm80_config.h"
#include "attention/flash_bwd_sm90_config.h"
#include "attention/flash_fwd_sm90_config.h"
#include "attention/flash_sm80_config.h"
#include "attention/paged_decode_config.h"
#include "gemm/gemm_sm90_config.h"
#include "gemm/gemm_sm90_w4_some_rows_config.h"
#include "runtime/batch_builder.h"
#include "runtime/block_pool.h"
#include "runtime/checks.h"
#include "runtime/ngram_index.h"
#include "runtime/prefix_tree.h"
#include "runtime/scheduled_batch.h"
#include "runtime/token_sequence.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace fastattn {
namespace {

py::bytes as_bytes(const int32_t* tokens, size_t count) {
  return {reinterpret_cast<const char*>(tokens), count * sizeof(int32_t)};
}

void bind_token_sequence(py::module_& m) {
  py::class_<TokenSequence, std::shared_ptr<TokenSequence>>(m, "TokenSequence",
                                                            "One request's tokens, drafts, KV blocks and sampling row.")
      .def(py::init<std::vector<int32_t>>(), "token_ids"_a)
      .def("append", &TokenSequence::append, "token"_a)
      .def("extend", &TokenSequence::extend, "tokens"_a)
      .def("append_unknown", &TokenSequence::append_unknown, "row"_a,
           "Adds the token that a step is still drawing as its row-th; `settle` says which it was.")
      .def("settle", &TokenSequence::settle, "token"_a, "Puts a token in the place of the unknown one.")
      .def_property_readonly("has_unknown", &TokenSequence::has_unknown)
      .def("end", &TokenSequence::end, "Nothing is drawn for it any more; an unknown token is none of its tokens.")
      .def_property_readonly("has_ended", &TokenSequence::has_ended)
      .def("set_ends", &TokenSequence::set_ends, "max_outputs"_a, "stop_token_ids"_a,
           "The output ends with the max_outputs-th token or with one of stop_token_ids.")
      .def_property_readonly("num_outputs", &TokenSequence::num_outputs, "Known tokens after those it was made with.")
      .def(
          "outputs",
          [](const TokenSequence& s, int64_t start) {
            if (start < 0 || start > s.num_outputs()) {
              refuse("TokenSequence.outputs: start is ", start, ", allowed is 0 to ", s.num_outputs());
            }
            return s.slice(s.num_prompt() + start, s.num_prompt() + s.num_outputs());
          },
          "start"_a = 0, "Those tokens from the start-th on.")
      .def_readwrite("needs", &TokenSequence::needs, "Bits that a batch has of all its sequences; the engine's.")
      .def_readwrite("is_watched", &TokenSequence::is_watched,
                     "`ScheduledBatch.settle` leaves its tokens to the owner.")
      .def_readwrite("is_streamed", &TokenSequence::is_streamed, "`ScheduledBatch.settle` tells the owner of them.")
      .def("truncate", &TokenSequence::truncate, "length"_a,
           "Keeps the first `length` tokens; not fewer than num_computed.")
      .def("__len__", &TokenSequence::size)
      .def("tokens", &TokenSequence::slice, "start"_a = 0, "end"_a = -1,
           "Tokens start … end - 1; end -1 is all the rest.")
      .def(
          "token_bytes",
          [](const TokenSequence& s, int64_t end) {
            if (end < 0 || end > s.size()) {
              refuse("TokenSequence.token_bytes: end is ", end, ", allowed is 0 to ", s.size());
            }
            return as_bytes(s.tokens().data(), end);
          },
          "end"_a, "The first `end` tokens as int32 bytes.")
      .def_property("num_computed", &TokenSequence::num_computed, &TokenSequence::set_num_computed,
                    "How many tokens have their keys and values in the cache.")
      .def_property_readonly("num_pending", &TokenSequence::num_pending, "The others; drafts come on top.")
      .def_property("drafts", &TokenSequence::drafts, &TokenSequence::set_drafts,
                    "A copy of the guesses at what comes next, which are no tokens yet; gone when the tokens change.")
      .def_property_readonly("num_drafts", [](const TokenSequence& s) { return s.drafts().size(); })
      .def_property_readonly("num_blocks", [](const TokenSequence& s) { return s.blocks().size(); })
      .def("blocks", &TokenSequence::blocks, "A copy of the block ids, in order.")
      .def("add_blocks", &TokenSequence::add_blocks, "blocks"_a)
      .def("take_blocks", &TokenSequence::take_blocks, "Returns the blocks and forgets them; num_computed becomes 0.")
      .def("set_sampling", &TokenSequence::set_sampling, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "seed"_a);
}

void bind_block_pool(py::module_& m) {
  py::class_<BlockPool, std::shared_ptr<BlockPool>>(m, "BlockPool", "Reference-counted ids 0 … num_blocks - 1.")
      .def(py::init<int64_t>(), "num_blocks"_a)
      .def_property_readonly("num_blocks", &BlockPool::num_blocks)
      .def_property_readonly("num_free", &BlockPool::num_free)
      .def("allocate", &BlockPool::allocate, "n"_a, "n blocks with one reference each, or None if fewer are free.")
      .def(
          "grow",
          [](BlockPool& pool, const ScheduledBatch& batch, int64_t block_size) {
            return pool.grow(batch.sequences(), block_size);
          },
          "batch"_a, "block_size"_a,
          "A block more for each sequence whose blocks are full. Returns how many are missing for that, 0 if done.")
      .def("retain", &BlockPool::retain, "blocks"_a, "One more reference on each.")
      .def("release", &BlockPool::release, "blocks"_a, "One reference fewer on each; returns how many became free.")
      .def("ref_count", &BlockPool::ref_count, "block"_a)
      .def("check", &BlockPool::check, "Raises RuntimeError if an invariant is broken.");
}

void bind_prefix_tree(py::module_& m) {
  py::class_<PrefixTree>(m, "PrefixTree", "Radix tree over runs of whole blocks, one root per salt.")
      .def(py::init<std::shared_ptr<BlockPool>, int64_t>(), "pool"_a, "block_size"_a)
      .def(
          "match",
          [](PrefixTree& tree, const py::bytes& salt, const TokenSequence& seq, int64_t max_tokens) {
            return tree.match(std::string(salt), seq, max_tokens);
          },
          "salt"_a, "seq"_a, "max_tokens"_a = -1,
          "Blocks of the longest cached prefix of the first max_tokens tokens, retained for the caller.")
      .def(
          "match_partial",
          [](PrefixTree& tree, const py::bytes& salt, const TokenSequence& seq, int64_t max_tokens,
             int64_t min_tokens) { return tree.match_partial(std::string(salt), seq, max_tokens, min_tokens); },
          "salt"_a, "seq"_a, "max_tokens"_a = -1, "min_tokens"_a = 1,
          "A cached block, retained for the caller, that follows those of `match` and begins with the most of the next "
          "tokens, with how many; None if fewer than min_tokens.")
      .def(
          "insert",
          [](PrefixTree& tree, const py::bytes& salt, const TokenSequence& seq, int64_t num_tokens) {
            return tree.insert(std::string(salt), seq, num_tokens);
          },
          "salt"_a, "seq"_a, "num_tokens"_a,
          "Caches the whole blocks among the first num_tokens; returns how many are new.")
      .def(
          "evict", [](PrefixTree& tree, int64_t num_blocks) { return tree.evict(num_blocks); }, "num_blocks"_a,
          "Frees least recently used blocks that only the tree holds.")
      .def(
          "evict_runs",
          [](PrefixTree& tree, int64_t num_blocks) {
            std::vector<PrefixTree::EvictedRun> runs;
            tree.evict(num_blocks, &runs);
            py::list found;
            for (const auto& run : runs) {
              found.append(
                  py::make_tuple(py::bytes(run.salt), as_bytes(run.tokens.data(), run.tokens.size()), run.blocks));
            }
            return found;
          },
          "num_blocks"_a,
          "As evict; returns (salt, all tokens of a prefix as int32 bytes, its last blocks, which are free now) of "
          "each edge.")
      .def("clear", &PrefixTree::clear, "Drops all cached blocks; returns how many became free.")
      .def_property_readonly("num_cached", &PrefixTree::num_cached)
      .def_property_readonly("num_evictable", &PrefixTree::num_evictable)
      .def("check", &PrefixTree::check, "Raises RuntimeError if an invariant is broken.");
}

void bind_scheduled_batch(py::module_& m) {
  py::class_<ScheduledBatch>(m, "ScheduledBatch", "What every step does with its sequences, for all in one call.")
      .def(py::init<ScheduledBatch::Sequences, std::vector<int64_t>>(), "sequences"_a, "num_tokens"_a)
      .def_static("of_decodes", &ScheduledBatch::of_decodes, "sequences"_a,
                  "A batch of those with one token to compute and no drafts, and the indices of the others.")
      .def("__len__", &ScheduledBatch::size)
      .def_property_readonly("total_tokens", &ScheduledBatch::total_tokens)
      .def_property_readonly("needs", &ScheduledBatch::needs, "The bits of all sequences together.")
      .def_property_readonly("draw_needs", &ScheduledBatch::draw_needs, "The bits of those in `draws`.")
      .def_property_readonly("only_decodes", &ScheduledBatch::only_decodes)
      .def_property_readonly("prefills", &ScheduledBatch::prefills,
                             "Indices of those that are in their prompt, or have more than one token to compute.")
      .def_property_readonly("draws", &ScheduledBatch::draws, "Indices of those whose next token is drawn.")
      .def_property_readonly("num_drafted", &ScheduledBatch::num_drafted, "Drafts to verify of each of `draws`.")
      .def("num_shared_blocks", &ScheduledBatch::num_shared_blocks, "block_size"_a, "least_keys"_a, "least_seqs"_a,
           "The first blocks that all sequences have computed and have in common; 0 if reading them once spares fewer "
           "than least_keys keys, or for fewer than least_seqs sequences.")
      .def("advance", &ScheduledBatch::advance, "block_size"_a,
           "Counts the tokens as computed; returns the indices of those that filled a block.")
      .def("append_unknown", &ScheduledBatch::append_unknown, "What they draw is a token that is not known yet.")
      .def(
          "settle",
          [](ScheduledBatch& batch, const std::vector<int32_t>& drawn) {
            ScheduledBatch::Settled found = batch.settle(drawn);
            return py::make_tuple(found.watched, found.streamed, found.num_settled);
          },
          "drawn"_a,
          "Says what they drew. Returns the rows that are left to their owner, those of which it wants to hear, and "
          "how "
          "many took their token.");
}

void bind_batch_builder(py::module_& m) {
  py::class_<BatchInfo>(m, "BatchInfo", "What a built step holds.")
      .def_readonly("num_tokens", &BatchInfo::num_tokens)
      .def_readonly("num_seqs", &BatchInfo::num_seqs)
      .def_readonly("num_logits", &BatchInfo::num_logits)
      .def_readonly("max_seqlen_q", &BatchInfo::max_seqlen_q)
      .def_readonly("max_seqlen_k", &BatchInfo::max_seqlen_k)
      .def_readonly("nbytes", &BatchInfo::nbytes);
  py::class_<BatchBuilder>(m, "BatchBuilder", "Writes every array of one step into one buffer at fixed offsets.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t>(), "max_num_tokens"_a, "max_num_seqs"_a,
           "max_blocks_per_seq"_a, "block_size"_a, "max_logits_per_seq"_a = 1)
      .def_property_readonly("nbytes", &BatchBuilder::nbytes)
      .def("layout",
           [](const BatchBuilder& builder) {
             py::dict layout;
             for (const BatchBuilder::Field& field : builder.layout()) {
               layout[field.name.c_str()] = py::make_tuple(field.offset, field.dtype, py::tuple(py::cast(field.shape)));
             }
             return layout;
           })
      .def("build", &BatchBuilder::build, "address"_a, "sequences"_a, "num_tokens"_a, "pad_num_seqs"_a = 0,
           "pad_num_tokens"_a = 0, "cascade"_a = false, "num_shared_blocks"_a = 0,
           "Fills the buffer at `address` (nbytes long) for num_tokens[i] tokens of sequences[i], drafts after the "
           "rest; with cascade, what all share as one more sequence.")
      .def(
          "build",
          [](const BatchBuilder& builder, uintptr_t address, const ScheduledBatch& batch, int64_t pad_num_seqs,
             int64_t pad_num_tokens, bool cascade, int64_t num_shared_blocks) {
            return builder.build(address, {batch.sequences().begin(), batch.sequences().end()}, batch.num_tokens(),
                                 pad_num_seqs, pad_num_tokens, cascade, num_shared_blocks);
          },
          "address"_a, "batch"_a, "pad_num_seqs"_a = 0, "pad_num_tokens"_a = 0, "cascade"_a = false,
          "num_shared_blocks"_a = 0);
}

void bind_ngram_index(py::module_& m) {
  py::class_<NgramIndex>(m, "NgramIndex", "Prompt lookup: what followed the last time these tokens were seen.")
      .def(py::init<int64_t, int64_t>(), "min_n"_a, "max_n"_a)
      .def("extend", &NgramIndex::extend, "tokens"_a)
      .def("propose", &NgramIndex::propose, "max_tokens"_a)
      .def("__len__", &NgramIndex::size);
}

// What the heuristics of the kernels choose, for `fastattn.explain` and for tests without a GPU.
void bind_kernel_configs(py::module_& m) {
  m.def(
      "flash_sm80_config",
      [](int64_t num_seqs, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t max_seqlen_q,
         int64_t max_seqlen_k, int64_t num_sms, bool batch_invariant) {
        const FlashSm80Config c = flash_sm80_config(
            {num_seqs, num_heads, num_kv_heads, head_dim, max_seqlen_q, max_seqlen_k, num_sms, batch_invariant});
        return py::dict("head_dim"_a = c.head_dim, "block_m"_a = c.tile.block_m, "block_n"_a = c.tile.block_n,
                        "num_m_tiles"_a = c.num_m_tiles, "num_splits"_a = c.num_splits);
      },
      "num_seqs"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "max_seqlen_q"_a, "max_seqlen_k"_a, "num_sms"_a,
      "batch_invariant"_a = false);
  m.def(
      "flash_bwd_sm80_config",
      [](int64_t num_seqs, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t max_seqlen_q,
         int64_t max_seqlen_k, bool deterministic, int64_t shared_memory, int64_t num_sms) {
        const FlashBwdSm80Config c =
            flash_bwd_sm80_config({num_seqs, num_heads, num_kv_heads, head_dim, num_seqs * max_seqlen_q, max_seqlen_q,
                                   max_seqlen_k, false, deterministic, shared_memory, num_sms});
        const int64_t num_ctas = c.num_n_blocks * num_kv_heads * num_seqs * c.num_splits;
        return py::dict("head_dim"_a = c.head_dim, "block_m"_a = c.tile.block_m, "block_n"_a = c.tile.block_n,
                        "smem_bytes"_a = flash_bwd_sm80_smem_bytes(c.head_dim, c.large), "num_splits"_a = c.num_splits,
                        "num_tiles"_a = num_ctas, "num_ctas"_a = num_ctas);
      },
      "num_seqs"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "max_seqlen_q"_a, "max_seqlen_k"_a,
      "deterministic"_a, "shared_memory"_a, "num_sms"_a);
  m.def(
      "flash_bwd_sm90_config",
      [](int64_t num_seqs, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t max_seqlen_q,
         int64_t max_seqlen_k, bool causal, int64_t num_sms) {
        const FlashBwdSm90Problem problem = {
            num_seqs,     num_heads,    num_kv_heads, head_dim, num_seqs * max_seqlen_q,
            max_seqlen_q, max_seqlen_k, false,        causal,   num_sms};
        const FlashBwdSm90Config c = flash_bwd_sm90_config(problem);
        return py::dict("head_dim"_a = c.head_dim, "block_m"_a = c.tile.block_m, "block_n"_a = c.tile.block_n,
                        "smem_bytes"_a = flash_bwd_sm90_smem_bytes(c.head_dim),
                        "is_better"_a = flash_bwd_sm90_is_better(problem), "num_tiles"_a = c.num_tiles,
                        "num_ctas"_a = c.num_ctas);
      },
      "num_seqs"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "max_seqlen_q"_a, "max_seqlen_k"_a, "causal"_a,
      "num_sms"_a);
  m.def(
      "paged_decode_config",
      [](int64_t num_seqs, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t max_seqlen_q,
         int64_t max_seqlen_k, int64_t num_sms, bool large_smem, bool beside_prompts, bool is_8bit,
         bool batch_invariant, bool has_tree) {
        const PagedDecodeConfig c =
            paged_decode_config({num_seqs, num_heads, num_kv_heads, head_dim, max_seqlen_q, max_seqlen_k, num_sms,
                                 large_smem, is_8bit, beside_prompts, batch_invariant, has_tree});
        return py::dict("fits"_a = c.fits, "head_dim"_a = c.head_dim, "block_m"_a = kPagedDecodeRows,
                        "block_n"_a = c.block_n, "num_warps"_a = c.num_warps, "num_columns"_a = c.num_columns,
                        "max_tiles"_a = c.max_tiles, "num_parts"_a = c.num_parts, "num_teams"_a = c.num_teams,
                        "num_ctas"_a = c.num_ctas, "parts_of_head"_a = c.parts_of_head,
                        "split_tiles"_a = c.batch_invariant ? 1 << c.split_tiles_log2 : 0,
                        "slots_of_area"_a = c.slots_of_area, "rows_of_slot"_a = c.rows_of_slot,
                        "cluster_size"_a = 1 << c.cluster_log2);
      },
      "num_seqs"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "max_seqlen_q"_a, "max_seqlen_k"_a, "num_sms"_a,
      "large_smem"_a, "beside_prompts"_a = false, "is_8bit"_a = false, "batch_invariant"_a = false,
      "has_tree"_a = false);
  m.def(
      "flash_fwd_sm90_config",
      [](int64_t num_seqs, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t v_head_dim,
         int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal, int64_t num_sms, int64_t packed_tokens,
         bool batch_invariant, bool fp8, bool extras) {
        const FlashFwdSm90Config c =
            flash_fwd_sm90_config({num_seqs, num_heads, num_kv_heads, head_dim, v_head_dim, max_seqlen_q, max_seqlen_k,
                                   causal, num_sms, packed_tokens, extras, fp8, false, false, batch_invariant});
        return py::dict("head_dim"_a = c.head_dim, "v_head_dim"_a = c.v_head_dim, "block_m"_a = c.tile.block_m(),
                        "block_n"_a = c.tile.block_n, "packs"_a = c.packs, "tile_tokens"_a = c.tile_tokens,
                        "num_m_tiles"_a = c.num_m_tiles, "pairs_per_section"_a = c.order.pairs_per_section,
                        "num_sections"_a = c.order.num_sections, "pairs_in_last"_a = c.order.pairs_in_last,
                        "heads_of_section"_a = c.heads_of_section, "num_splits"_a = c.num_splits,
                        "num_tiles"_a = c.num_tiles, "num_ctas"_a = c.num_ctas,
                        "few_keys"_a = flash_fwd_sm90_few_keys(c, num_seqs, num_kv_heads, 2));
      },
      "num_seqs"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "v_head_dim"_a, "max_seqlen_q"_a, "max_seqlen_k"_a,
      "causal"_a, "num_sms"_a, "packed_tokens"_a = -1, "batch_invariant"_a = false, "fp8"_a = false,
      "extras"_a = false);
  m.def(
      "gemm_sm90_config",
      [](int64_t rows, int64_t n, int64_t k, int64_t num_sms, int64_t element_bytes, bool two_levels,
         const std::string& norm, bool gated, bool block_scales, bool zero_points, bool in_order, bool fast_accum,
         bool added) {
        const GemmSm90Norm kind = norm == "rms"         ? GemmSm90Norm::kRms
                                  : norm == "rms_given" ? GemmSm90Norm::kRmsGiven
                                  : norm == "layer"     ? GemmSm90Norm::kLayer
                                                        : GemmSm90Norm::kNone;
        const GemmSm90Config c = gemm_sm90_config({rows, n, k, num_sms, element_bytes, two_levels, kind, gated,
                                                   block_scales, zero_points, in_order, added, fast_accum});
        return py::dict("few_rows"_a = c.few_rows, "block_m"_a = c.tile.block_m, "block_n"_a = c.tile.block_n,
                        "ctas_per_sm"_a = c.tile.ctas_per_sm, "turns"_a = c.tile.turns, "in_order"_a = c.tile.in_order,
                        "weight_rows"_a = c.weight_rows, "num_splits"_a = c.num_splits, "stream_k"_a = c.stream_k,
                        "gives_norms"_a = c.gives_norms, "m_tiles"_a = c.m_tiles, "n_tiles"_a = c.n_tiles,
                        "rows"_a = c.rows, "group_rows"_a = c.group_rows, "num_ctas"_a = c.num_ctas);
      },
      "m"_a, "n"_a, "k"_a, "num_sms"_a, "element_bytes"_a = 2, "two_levels"_a = false, "norm"_a = "", "gated"_a = false,
      "block_scales"_a = false, "zero_points"_a = false, "in_order"_a = false, "fast_accum"_a = false,
      "added"_a = false);
  m.def(
      "gemm_sm90_w4_config",
      [](int64_t rows, int64_t n, int64_t k, double weight_bits, int64_t num_sms, int64_t x_bytes, bool two_levels,
         bool in_tiles) {
        const GemmSm90W4Config c =
            gemm_sm90_w4_config({rows, n, k, weight_bits, num_sms, x_bytes, two_levels, in_tiles});
        return py::dict("many_rows"_a = c.many_rows, "block_m"_a = c.tile.block_m, "block_n"_a = c.tile.block_n,
                        "ctas_per_sm"_a = c.tile.ctas_per_sm, "num_splits"_a = c.num_splits, "stream_k"_a = c.stream_k,
                        "m_tiles"_a = c.m_tiles, "n_tiles"_a = c.n_tiles, "num_ctas"_a = c.num_ctas);
      },
      "m"_a, "n"_a, "k"_a, "weight_bits"_a, "num_sms"_a, "x_bytes"_a = 2, "two_levels"_a = false, "in_tiles"_a = false);
  m.def(
      "gemm_sm90_w4_some_rows_config",
      [](int64_t rows, int64_t n, int64_t k, int64_t num_sms) {
        const GemmSm90W4SomeRowsConfig c = gemm_sm90_w4_some_rows_config(rows, n, k, num_sms);
        return py::dict("block_m"_a = c.block_m, "num_splits"_a = c.num_splits, "box_tiles"_a = c.box_tiles,
                        "num_ctas"_a = c.num_ctas);
      },
      "m"_a, "n"_a, "k"_a, "num_sms"_a);
}

}  // namespace
}  // namespace fastattn

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "Host-side data structures of the engine; plain C++, no CUDA, no torch.";
  fastattn::bind_token_sequence(m);
  fastattn::bind_block_pool(m);
  fastattn::bind_prefix_tree(m);
  fastattn::bind_scheduled_batch(m);
  fastattn::bind_batch_builder(m);
  fastattn::bind_ngram_index(m);
  fastattn::bind_kernel_configs(m);
}

// Which prefixes are in the KV cache, and in which blocks.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "runtime/block_pool.h"
#include "runtime/token_sequence.h"

namespace fastattn {

// A radix tree over runs of whole blocks, one root per salt (tenants never meet). It holds one reference on each block
// in it.
//
//   root ──[A A B B | blocks 0 1]──┬──[C C | 2]
//                                  └──[D D E E | 5 6]      block_size 2: an edge is a run of blocks and their tokens
//
// Children are in the order of their first blocks' tokens, so that the one which shares the most tokens with a given
// block is beside the place where that would stand. Eviction takes blocks from the ends of least recently used leaves,
// and only those that nobody but the tree holds.
class PrefixTree {
 public:
  PrefixTree(std::shared_ptr<BlockPool> pool, int64_t block_size);
  ~PrefixTree();
  PrefixTree(const PrefixTree&) = delete;
  PrefixTree& operator=(const PrefixTree&) = delete;

  // Blocks of the longest known prefix of the first max_tokens tokens (−1: all), in whole blocks, retained for the
  // caller.
  std::vector<int32_t> match(const std::string& salt, const TokenSequence& seq, int64_t max_tokens);
  // A cached block that follows those of `match` and begins with the most of the tokens that come next, up to
  // max_tokens, with how many it shares: at least min_tokens. Retained for the caller, who may copy that much of it.
  std::optional<std::pair<int32_t, int64_t>> match_partial(const std::string& salt, const TokenSequence& seq,
                                                           int64_t max_tokens, int64_t min_tokens);
  // Remembers the whole blocks among the first num_tokens; returns how many were new. Known ones keep the block they
  // have.
  int64_t insert(const std::string& salt, const TokenSequence& seq, int64_t num_tokens);
  // Blocks of one edge that left the tree together, in order: the last of the prefix that tokens spells.
  struct EvictedRun {
    std::string salt;
    std::vector<int32_t> tokens;  // from the beginning on
    std::vector<int32_t> blocks;
  };
  // Returns how many became free. runs: to which what left is added.
  int64_t evict(int64_t num_blocks, std::vector<EvictedRun>* runs = nullptr);
  int64_t clear();

  int64_t num_cached() const { return num_cached_; }
  int64_t num_evictable() const;  // walks the tree
  void check() const;

 private:
  struct Node;
  struct Tokens {
    const int32_t* data;
    int64_t size;
  };
  struct ByFirstBlock {
    using is_transparent = void;
    int64_t block_size;

    Tokens of(const std::unique_ptr<Node>& node) const { return {node->tokens.data(), block_size}; }
    Tokens of(const Tokens& tokens) const { return tokens; }
    template <typename A, typename B>
    bool operator()(const A& a, const B& b) const {
      return comes_before(of(a), of(b));
    }
  };
  struct Node {
    explicit Node(int64_t block_size) : children(ByFirstBlock{block_size}) {}

    Node* parent = nullptr;
    const std::string* salt = nullptr;  // its key in roots_, of roots only
    std::vector<int32_t> tokens;        // block_size × blocks.size()
    std::vector<int32_t> blocks;
    uint64_t last_used = 0;
    std::set<std::unique_ptr<Node>, ByFirstBlock> children;
  };
  struct Position {
    Node* node;           // the last node that the walk entered
    int64_t num_in_edge;  // how many of its blocks matched
    int64_t num_matched;  // blocks matched from the root on
  };
  using Leaf = std::pair<uint64_t, Node*>;  // least recently used first; clock ticks are unique

  Position walk(Node* root, const int32_t* tokens, int64_t num_blocks) const;
  Node* find_child(const Node& node, const int32_t* block_tokens) const;
  static bool comes_before(const Tokens& a, const Tokens& b);
  void touch(Node* node);
  void split(Node* node, int64_t num_blocks);
  bool remove_leaf(Node* node);  // whether its parent became a leaf
  static EvictedRun run_of(const Node* node, int64_t first_block);
  static std::vector<const Node*> parents_first(const Node* root);

  std::shared_ptr<BlockPool> pool_;
  int64_t block_size_;
  std::map<std::string, std::unique_ptr<Node>> roots_;
  std::set<Leaf> leaves_;
  uint64_t clock_ = 0;
  int64_t num_cached_ = 0;
};

}  // namespace fastattn

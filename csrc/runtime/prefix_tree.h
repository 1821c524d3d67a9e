// Which prefixes are in the KV cache, and in which blocks.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
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
// A hit is proven: the hash of an edge's first block only finds candidates, then tokens are compared.
// Eviction takes blocks from the ends of least recently used leaves, and only those that nobody but the tree holds.
class PrefixTree {
 public:
  PrefixTree(std::shared_ptr<BlockPool> pool, int64_t block_size);
  ~PrefixTree();
  PrefixTree(const PrefixTree&) = delete;
  PrefixTree& operator=(const PrefixTree&) = delete;

  // Blocks of the longest known prefix of the first max_tokens tokens (−1: all), in whole blocks, retained for the
  // caller.
  std::vector<int32_t> match(const std::string& salt, const TokenSequence& seq, int64_t max_tokens);
  // Remembers the whole blocks among the first num_tokens; returns how many were new. Known ones keep the block they
  // have.
  int64_t insert(const std::string& salt, const TokenSequence& seq, int64_t num_tokens);
  int64_t evict(int64_t num_blocks);
  int64_t clear();

  int64_t num_cached() const { return num_cached_; }
  int64_t num_evictable() const;  // walks the tree
  void check() const;

 private:
  struct Node {
    Node* parent = nullptr;
    const std::string* salt = nullptr;  // its key in roots_, of roots only
    std::vector<int32_t> tokens;        // block_size × blocks.size()
    std::vector<int32_t> blocks;
    uint64_t last_used = 0;
    std::unordered_multimap<uint64_t, std::unique_ptr<Node>> children;  // by the hash of their first block's tokens
  };
  struct Position {
    Node* node;           // the last node that the walk entered
    int64_t num_in_edge;  // how many of its blocks matched
    int64_t num_matched;  // blocks matched from the root on
  };
  using Leaf = std::pair<uint64_t, Node*>;  // least recently used first; clock ticks are unique

  Position walk(Node* root, const int32_t* tokens, int64_t num_blocks) const;
  Node* find_child(const Node& node, const int32_t* block_tokens) const;
  uint64_t hash_block(const int32_t* block_tokens) const;
  void touch(Node* node);
  void split(Node* node, int64_t num_blocks);
  bool remove_leaf(Node* node);  // whether its parent became a leaf
  static std::vector<const Node*> parents_first(const Node* root);

  std::shared_ptr<BlockPool> pool_;
  int64_t block_size_;
  std::map<std::string, std::unique_ptr<Node>> roots_;
  std::set<Leaf> leaves_;
  uint64_t clock_ = 0;
  int64_t num_cached_ = 0;
};

}  // namespace fastattn

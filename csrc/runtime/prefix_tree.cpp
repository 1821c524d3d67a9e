#include "runtime/prefix_tree.h"

#include <algorithm>
#include <iterator>
#include <unordered_map>

#include "runtime/checks.h"

namespace fastattn {

PrefixTree::PrefixTree(std::shared_ptr<BlockPool> pool, int64_t block_size)
    : pool_(std::move(pool)), block_size_(block_size) {
  if (!pool_) refuse("PrefixTree: pool is None, expected a BlockPool");
  if (block_size < 1 || block_size > (1 << 20)) {
    refuse("PrefixTree: block_size is ", block_size, ", allowed is 1 to 2**20");
  }
}

PrefixTree::~PrefixTree() { clear(); }

std::vector<int32_t> PrefixTree::match(const std::string& salt, const TokenSequence& seq, int64_t max_tokens) {
  if (max_tokens < -1) refuse("PrefixTree.match: max_tokens is ", max_tokens, ", allowed is -1 or more");
  const auto root = roots_.find(salt);
  if (root == roots_.end()) return {};
  const int64_t limit = max_tokens < 0 ? seq.size() : std::min(max_tokens, seq.size());
  const Position at = walk(root->second.get(), seq.tokens().data(), limit / block_size_);
  if (at.num_matched == 0) return {};

  std::vector<int32_t> blocks(at.num_matched);
  auto end = blocks.end();
  int64_t num_in_edge = at.num_in_edge;
  for (Node* node = at.node; node->parent != nullptr; node = node->parent) {
    end = std::copy_backward(node->blocks.begin(), node->blocks.begin() + num_in_edge, end);
    num_in_edge = node->parent->blocks.size();
  }
  pool_->retain(blocks);
  touch(at.node);
  return blocks;
}

std::optional<std::pair<int32_t, int64_t>> PrefixTree::match_partial(const std::string& salt, const TokenSequence& seq,
                                                                     int64_t max_tokens, int64_t min_tokens) {
  if (max_tokens < -1) refuse("PrefixTree.match_partial: max_tokens is ", max_tokens, ", allowed is -1 or more");
  if (min_tokens < 1) refuse("PrefixTree.match_partial: min_tokens is ", min_tokens, ", allowed is 1 or more");
  const auto root = roots_.find(salt);
  if (root == roots_.end()) return std::nullopt;
  const int64_t limit = max_tokens < 0 ? seq.size() : std::min(max_tokens, seq.size());
  const Position at = walk(root->second.get(), seq.tokens().data(), limit / block_size_);
  const int64_t num_known = at.num_matched * block_size_;
  const Tokens wanted{seq.tokens().data() + num_known, std::min(limit - num_known, block_size_)};

  Node* best = nullptr;
  int64_t best_block = 0, num_shared = min_tokens - 1;
  const auto consider = [&](Node* node, int64_t block) {
    const int32_t* end = wanted.data + wanted.size;
    const int64_t shared =
        std::mismatch(wanted.data, end, node->tokens.begin() + block * block_size_).first - wanted.data;
    if (shared <= num_shared) return;
    best = node;
    best_block = block;
    num_shared = shared;
  };
  if (at.num_in_edge < static_cast<int64_t>(at.node->blocks.size())) {
    consider(at.node, at.num_in_edge);
  } else {
    const auto& children = at.node->children;
    const auto next = children.lower_bound(wanted);
    if (next != children.end()) consider(next->get(), 0);
    if (next != children.begin()) consider(std::prev(next)->get(), 0);
  }
  if (best == nullptr) return std::nullopt;
  const int32_t block = best->blocks[best_block];
  pool_->retain({block});
  touch(best);
  return std::pair(block, num_shared);
}

int64_t PrefixTree::insert(const std::string& salt, const TokenSequence& seq, int64_t num_tokens) {
  if (num_tokens < 0 || num_tokens > seq.size()) {
    refuse("PrefixTree.insert: num_tokens is ", num_tokens, ", allowed is 0 to ", seq.size());
  }
  const int64_t num_blocks = num_tokens / block_size_;
  if (num_blocks > static_cast<int64_t>(seq.blocks().size())) {
    refuse("PrefixTree.insert: num_tokens is ", num_tokens, ", but the sequence has only ", seq.blocks().size(),
           " blocks of ", block_size_, " tokens");
  }
  if (num_blocks == 0) return 0;
  auto root = roots_.find(salt);
  const Position at =
      root == roots_.end() ? Position{nullptr, 0, 0} : walk(root->second.get(), seq.tokens().data(), num_blocks);
  const int64_t num_new = num_blocks - at.num_matched;
  if (num_new == 0) {
    touch(at.node);
    return 0;
  }
  const std::vector<int32_t> blocks(seq.blocks().begin() + at.num_matched, seq.blocks().begin() + num_blocks);
  const std::vector<int32_t> tokens(seq.tokens().begin() + at.num_matched * block_size_,
                                    seq.tokens().begin() + num_blocks * block_size_);
  pool_->retain(blocks);  // refuses free blocks, before anything is changed
  if (root == roots_.end()) {
    root = roots_.emplace(salt, std::make_unique<Node>(block_size_)).first;
    root->second->salt = &root->first;
  }

  Node* node = at.node != nullptr ? at.node : root->second.get();
  const bool whole_edge = at.num_in_edge == static_cast<int64_t>(node->blocks.size());
  if (!whole_edge) split(node, at.num_in_edge);
  if (whole_edge && node->parent != nullptr && node->children.empty()) {
    // A sequence that grows extends its own leaf; a node per block would make long chains.
    node->tokens.insert(node->tokens.end(), tokens.begin(), tokens.end());
    node->blocks.insert(node->blocks.end(), blocks.begin(), blocks.end());
  } else {
    leaves_.erase({node->last_used, node});
    auto child = std::make_unique<Node>(block_size_);
    child->parent = node;
    child->tokens = tokens;
    child->blocks = blocks;
    node = node->children.insert(std::move(child)).first->get();
  }
  num_cached_ += num_new;
  touch(node);
  return num_new;
}

int64_t PrefixTree::evict(int64_t num_blocks, std::vector<EvictedRun>* runs) {
  if (num_blocks < 0) refuse("PrefixTree.evict: num_blocks is ", num_blocks, ", allowed is 0 or more");
  int64_t num_freed = 0;
  auto leaf = leaves_.begin();
  while (num_freed < num_blocks && leaf != leaves_.end()) {
    Node* node = leaf->second;
    int64_t num_left = node->blocks.size();
    while (num_freed < num_blocks && num_left > 0 && pool_->ref_count(node->blocks[num_left - 1]) == 1) {
      --num_left;
      ++num_freed;
    }
    if (runs != nullptr && num_left < static_cast<int64_t>(node->blocks.size())) {
      runs->push_back(run_of(node, num_left));
    }
    pool_->release({node->blocks.rbegin(), node->blocks.rend() - num_left});
    num_cached_ -= node->blocks.size() - num_left;
    node->blocks.resize(num_left);
    ++leaf;
    if (!node->blocks.empty()) {
      node->tokens.resize(node->blocks.size() * block_size_);
      continue;
    }
    // A parent that became a leaf may be older than those that were passed over: look from the start again.
    if (remove_leaf(node)) leaf = leaves_.begin();
  }
  return num_freed;
}

int64_t PrefixTree::clear() {
  int64_t num_freed = 0;
  for (auto& entry : roots_) {
    const std::vector<const Node*> nodes = parents_first(entry.second.get());
    // Children before parents and one by one: a deep tree must not be torn down by recursion.
    for (auto node = nodes.rbegin(); node != nodes.rend(); ++node) {
      num_freed += pool_->release((*node)->blocks);
      const_cast<Node*>(*node)->children.clear();
    }
  }
  roots_.clear();
  leaves_.clear();
  num_cached_ = 0;
  return num_freed;
}

int64_t PrefixTree::num_evictable() const {
  int64_t total = 0;
  for (const auto& entry : roots_) {
    const std::vector<const Node*> nodes = parents_first(entry.second.get());
    std::unordered_map<const Node*, bool>
        held;  // whether a block below is in use, so that this node can't become a leaf
    for (auto it = nodes.rbegin(); it != nodes.rend(); ++it) {
      const Node* node = *it;
      bool blocked = held[node];
      for (auto block = node->blocks.rbegin(); block != node->blocks.rend() && !blocked; ++block) {
        blocked = pool_->ref_count(*block) != 1;
        total += !blocked;
      }
      if (node->parent != nullptr) held[node->parent] = held[node->parent] || blocked;
    }
  }
  return total;
}

void PrefixTree::check() const {
  int64_t num_blocks = 0;
  size_t num_leaves = 0;
  std::set<int32_t> seen;
  for (const auto& entry : roots_) {
    for (const Node* node : parents_first(entry.second.get())) {
      invariant(node->tokens.size() == node->blocks.size() * block_size_, "an edge has tokens without blocks");
      invariant((node->parent == nullptr) == (node == entry.second.get()), "a node below the root has no parent");
      invariant(node->parent == nullptr ? node->blocks.empty() : !node->blocks.empty(),
                "an edge is empty, or a root is not");
      for (int32_t block : node->blocks) {
        invariant(seen.insert(block).second, "block ", block, " is cached twice");
        invariant(pool_->ref_count(block) >= 1, "cached block ", block, " is free");
      }
      num_blocks += node->blocks.size();
      const Node* before = nullptr;
      for (const auto& child : node->children) {
        invariant(child->parent == node, "a child has another parent");
        invariant(before == nullptr ||
                      comes_before({before->tokens.data(), block_size_}, {child->tokens.data(), block_size_}),
                  "two children begin alike, or are in a wrong order");
        before = child.get();
      }
      if (node->parent != nullptr && node->children.empty()) {
        invariant(leaves_.count({node->last_used, const_cast<Node*>(node)}) == 1, "a leaf is not in the LRU order");
        ++num_leaves;
      }
    }
  }
  invariant(num_leaves == leaves_.size(), "the LRU order has a node that is no leaf");
  invariant(num_blocks == num_cached_, "num_cached is ", num_cached_, " but ", num_blocks, " blocks are cached");
}

PrefixTree::Position PrefixTree::walk(Node* root, const int32_t* tokens, int64_t num_blocks) const {
  Position at{root, 0, 0};
  while (at.num_matched < num_blocks) {
    Node* child = find_child(*at.node, tokens + at.num_matched * block_size_);
    if (child == nullptr) break;
    const int64_t limit = std::min<int64_t>(child->blocks.size(), num_blocks - at.num_matched);
    const int32_t* first = tokens + at.num_matched * block_size_;
    const int64_t num_same = std::mismatch(first, first + limit * block_size_, child->tokens.begin()).first - first;
    at = {child, num_same / block_size_, at.num_matched + num_same / block_size_};
    if (at.num_in_edge < static_cast<int64_t>(child->blocks.size())) break;
  }
  return at;
}

PrefixTree::Node* PrefixTree::find_child(const Node& node, const int32_t* block_tokens) const {
  const auto child = node.children.find(Tokens{block_tokens, block_size_});
  return child == node.children.end() ? nullptr : child->get();
}

bool PrefixTree::comes_before(const Tokens& a, const Tokens& b) {
  return std::lexicographical_compare(a.data, a.data + a.size, b.data, b.data + b.size);
}

void PrefixTree::touch(Node* node) {
  // Ancestors need no stamp: they can only be evicted after all below them, and get theirs when they become leaves.
  const bool is_leaf = node->parent != nullptr && node->children.empty();
  leaves_.erase({node->last_used, node});
  node->last_used = ++clock_;
  if (is_leaf) leaves_.emplace(node->last_used, node);
}

// Cuts an edge after `num_blocks`: the node keeps the front, a new child takes the back and the children.
void PrefixTree::split(Node* node, int64_t num_blocks) {
  leaves_.erase({node->last_used, node});
  auto back = std::make_unique<Node>(block_size_);
  back->parent = node;
  back->last_used = node->last_used;
  back->tokens.assign(node->tokens.begin() + num_blocks * block_size_, node->tokens.end());
  back->blocks.assign(node->blocks.begin() + num_blocks, node->blocks.end());
  back->children = std::move(node->children);
  for (const auto& child : back->children) child->parent = back.get();
  node->tokens.resize(num_blocks * block_size_);
  node->blocks.resize(num_blocks);
  node->children.clear();
  if (back->children.empty()) leaves_.emplace(back->last_used, back.get());
  node->children.insert(std::move(back));
}

bool PrefixTree::remove_leaf(Node* node) {
  Node* parent = node->parent;
  const uint64_t last_used = node->last_used;
  leaves_.erase({last_used, node});
  parent->children.erase(parent->children.find(Tokens{node->tokens.data(), block_size_}));
  if (!parent->children.empty()) return false;
  if (parent->parent == nullptr) {
    roots_.erase(roots_.find(*parent->salt));  // tenants come and go; an empty root of each would stay for ever
    return false;
  }
  // It is as old as the youngest thing that was below it, and that was this node or one that left after it was used.
  parent->last_used = std::max(parent->last_used, last_used);
  leaves_.emplace(parent->last_used, parent);
  return true;
}

PrefixTree::EvictedRun PrefixTree::run_of(const Node* node, int64_t first_block) {
  std::vector<const Node*> path;
  for (; node->parent != nullptr; node = node->parent) path.push_back(node);
  EvictedRun run{*node->salt, {}, {path.front()->blocks.begin() + first_block, path.front()->blocks.end()}};
  for (auto step = path.rbegin(); step != path.rend(); ++step) {
    run.tokens.insert(run.tokens.end(), (*step)->tokens.begin(), (*step)->tokens.end());
  }
  return run;
}

std::vector<const PrefixTree::Node*> PrefixTree::parents_first(const Node* root) {
  std::vector<const Node*> nodes{root};
  for (size_t i = 0; i < nodes.size(); ++i) {
    for (const auto& child : nodes[i]->children) nodes.push_back(child.get());
  }
  return nodes;
}

}  // namespace fastattn

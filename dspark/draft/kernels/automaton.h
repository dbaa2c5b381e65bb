// Suffix automaton of one text, extended token by token: what
// dspark/draft/suffix_automaton.py is, state by state, with transitions in the order in which they
// were made.
//
// Most states have one transition, so a state's are a list; from MANY on they are found by a hash.

#pragma once

#include <cstdint>
#include <vector>

struct Edge {
  int64_t token;
  int32_t child, next;  // of the same state, -1: none
};

struct State {
  int32_t link, length, count, latest;
  int32_t first, last, edges;
};

class Automaton {
 public:
  static constexpr int64_t MOST = 1 << 29;  // tokens, so that states and transitions fit int32

  Automaton() { states_.push_back(State{-1, 0, 0, -1, -1, -1, 0}); }

  int64_t size() const { return size_; }
  const State& state(int32_t number) const { return states_[number]; }
  const Edge& edge(int32_t number) const { return edges_[number]; }
  int32_t repeated_suffix() const { return states_[last_].link < 0 ? 0 : states_[last_].link; }

  void extend(int64_t token, int64_t max_links) {
    int32_t state = last_;
    const int32_t made = (int32_t)states_.size();
    states_.push_back(State{0, states_[state].length + 1, 0, -1, -1, -1, 0});
    int32_t found = -1;
    while (state >= 0 && (found = find(state, token)) < 0) {
      add(state, token, made);
      state = states_[state].link;
    }
    if (state >= 0) states_[made].link = split(state, token, edges_[found].child);
    last_ = state = made;
    for (int64_t steps = max_links; state > 0 && steps; steps--) {
      states_[state].count++;
      states_[state].latest = (int32_t)size_;
      state = states_[state].link;
    }
    size_++;
  }

  // Lengthens a match by a token, or shortens it from the left until that works.
  void step(int32_t& state, int64_t& length, int64_t token) const {
    int32_t found;
    while ((found = find(state, token)) < 0) {
      state = states_[state].link;
      if (state < 0) {
        state = 0;
        length = 0;
        return;
      }
      length = states_[state].length;
    }
    state = edges_[found].child;
    length++;
  }

 private:
  static constexpr int32_t MANY = 8;

  std::vector<State> states_;
  std::vector<Edge> edges_;
  std::vector<int64_t> table_;  // transitions of states with many: number of the edge, and its state
  int64_t hashed_ = 0, size_ = 0;
  int32_t last_ = 0;

  // The state of exactly state's longest substring + token, cloned off if need be.
  int32_t split(int32_t state, int64_t token, int32_t follower) {
    if (states_[follower].length == states_[state].length + 1) return follower;
    const int32_t clone = (int32_t)states_.size();
    const State old = states_[follower];
    states_.push_back(
        State{old.link, states_[state].length + 1, old.count, old.latest, -1, -1, 0});
    for (int32_t e = old.first; e >= 0; e = edges_[e].next) {
      const Edge copied = edges_[e];
      add(clone, copied.token, copied.child);
    }
    states_[follower].link = clone;
    int32_t found;
    while (state >= 0 && (found = find(state, token)) >= 0 && edges_[found].child == follower) {
      edges_[found].child = clone;
      state = states_[state].link;
    }
    return clone;
  }

  int32_t find(int32_t number, int64_t token) const {
    const State& state = states_[number];
    if (state.edges > MANY) return find_hashed(number, token);
    for (int32_t e = state.first; e >= 0; e = edges_[e].next)
      if (edges_[e].token == token) return e;
    return -1;
  }

  void add(int32_t number, int64_t token, int32_t child) {
    const int32_t made = (int32_t)edges_.size();
    edges_.push_back(Edge{token, child, -1});
    State& state = states_[number];
    (state.first < 0 ? state.first : edges_[state.last].next) = made;
    state.last = made;
    state.edges++;
    if (state.edges == MANY + 1)
      for (int32_t e = state.first; e >= 0; e = edges_[e].next) hash_in(number, e);
    else if (state.edges > MANY)
      hash_in(number, made);
  }

  static uint64_t place_of(int32_t state, int64_t token) {
    uint64_t h = ((uint64_t)token + 1) * 0x9E3779B97F4A7C15u ^ (uint64_t)state * 0xC2B2AE3D27D4EB4Fu;
    h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93u;
    return h ^ (h >> 32);
  }

  int32_t find_hashed(int32_t state, int64_t token) const {
    const uint64_t mask = table_.size() - 1;
    for (uint64_t at = place_of(state, token) & mask; table_[at] >= 0; at = (at + 1) & mask)
      if ((int32_t)(table_[at] >> 32) == state && edges_[(int32_t)table_[at]].token == token)
        return (int32_t)table_[at];
    return -1;
  }

  void hash_in(int32_t state, int32_t edge) {
    if (2 * (uint64_t)(hashed_ + 1) > table_.size()) {
      std::vector<int64_t> old(table_.empty() ? 64 : 2 * table_.size(), -1);
      old.swap(table_);
      for (int64_t entry : old)
        if (entry >= 0) put((int32_t)(entry >> 32), (int32_t)entry);
    }
    put(state, edge);
    hashed_++;
  }

  void put(int32_t state, int32_t edge) {
    const uint64_t mask = table_.size() - 1;
    uint64_t at = place_of(state, edges_[edge].token) & mask;
    while (table_[at] >= 0) at = (at + 1) & mask;
    table_[at] = (int64_t)state << 32 | edge;
  }
};

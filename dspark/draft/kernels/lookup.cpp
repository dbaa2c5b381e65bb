// The lookup drafter of dspark/draft/lookup.py: all requests of a round in one call.
//
// Every number is computed as the Python drafter computes it, in doubles and in the same order, and
// ties fall the same way, so that both offer the same trees to the last bit.

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "automaton.h"
#include "corpus.h"

extern "C" {

struct Settings {
  int64_t max_links, max_matches, max_followers, sample, least, corpus_size;
  double leftover, doubt, shared_doubt, min_survival;
  const int64_t* words[Corpus::WORDS];
};

struct Request {  // what one request asks
  int64_t text, is_new, tokens, budget, depth, width;
};
}

// A request's own text, and where its endings stand in the corpus.
struct Text {
  Automaton own;
  Place places[Corpus::MOST];
  int64_t found = 0;
};

struct Node {
  int64_t token, parent, depth;
  double survival;
  int64_t matches;  // of the path that ends here, from when it is expanded
};

// Where the endings of a path stand.
struct Matches {
  int32_t state;   // in the request's own text
  int64_t length;  // matched there
  int64_t found;
  Place places[Corpus::MOST];  // in the corpus, longest first
};

struct Candidate {
  int64_t token;
  double share;
};

// Shares of candidates, in the order in which they first came.
class Blend {
 public:
  explicit Blend(const Settings& settings) : settings_(settings) {
    size_t size = 64;
    while (size < 2 * (size_t)(settings.max_matches * settings.max_followers)) size *= 2;
    table_.resize(size);
  }

  void begin() {
    candidates.clear();
    left_ = 1.0;
    turn_++;
  }

  // False when what is left over is not worth another match.
  bool add(const Follower* followers, int64_t size, int64_t newest, int64_t length, double doubt) {
    if (!size) return true;
    int64_t total = newest >= 0;
    for (int64_t i = 0; i < size; i++) total += followers[i].count;
    const double weight = (double)(total * length);
    const double mass = left_ * weight / (weight + doubt * (double)size);
    for (int64_t i = 0; i < size; i++) {
      const int64_t value = followers[i].count + (followers[i].token == newest);
      share_of(followers[i].token) += mass * (double)value / (double)total;
    }
    left_ -= mass;
    return left_ >= settings_.leftover;
  }

  std::vector<Candidate> candidates;

 private:
  const Settings& settings_;
  double left_ = 1.0;

  struct Slot {
    int64_t turn = 0, candidate = 0;
  };

  std::vector<Slot> table_;  // where a token is among the candidates; slots of old turns are free
  int64_t turn_ = 0;

  double& share_of(int64_t token) {
    const uint64_t mask = table_.size() - 1;
    uint64_t at = ((uint64_t)token * 0x9E3779B97F4A7C15u >> 32) & mask;
    for (; table_[at].turn == turn_; at = (at + 1) & mask) {
      Candidate& known = candidates[(size_t)table_[at].candidate];
      if (known.token == token) return known.share;
    }
    table_[at] = Slot{turn_, (int64_t)candidates.size()};
    candidates.push_back(Candidate{token, 0.0});
    return candidates.back().share;
  }
};

class Lookup {
 public:
  explicit Lookup(const Settings& settings)
      : settings_(settings),
        corpus_(settings.words, settings.corpus_size, settings.max_followers, settings.sample),
        blend_(settings_) {}

  int64_t add_text() {
    for (size_t i = 0; i < texts_.size(); i++)
      if (!texts_[i]) {
        texts_[i].reset(new Text());
        return (int64_t)i;
      }
    texts_.emplace_back(new Text());
    return (int64_t)texts_.size() - 1;
  }

  void drop_text(int64_t number) {
    if (number >= 0 && number < (int64_t)texts_.size()) texts_[number].reset();
  }

  // Nodes offered to all requests; [ends[i], ends[i + 1]) of them are request i's. -1: what is
  // asked makes no sense.
  int64_t run(int64_t count, const Request* asked, const int64_t* tokens, int64_t size,
              int64_t* ends) {
    joined_.clear();
    ends[0] = 0;
    for (int64_t i = 0; i < count; i++) {
      const Request& request = asked[i];
      if (request.text < 0 || request.text >= (int64_t)texts_.size()) return -1;
      std::unique_ptr<Text>& text = texts_[request.text];
      if (!text || request.tokens < 0 || request.tokens > size) return -1;
      if (request.is_new) text.reset(new Text());
      if (request.tokens > Automaton::MOST - text->own.size()) return -1;
      extend(*text, tokens, request.tokens);
      tokens += request.tokens;
      size -= request.tokens;
      grow(*text, request);
      ends[i + 1] = (int64_t)joined_.size();
    }
    return (int64_t)joined_.size();
  }

  void take(int64_t* token, int64_t* parent, int64_t* depth, double* survival) const {
    for (size_t i = 0; i < joined_.size(); i++) {
      token[i] = joined_[i].token;
      parent[i] = joined_[i].parent;
      depth[i] = joined_[i].depth;
      survival[i] = joined_[i].survival;
    }
  }

 private:
  struct Joined {
    int64_t token, parent, depth;
    double survival;
  };

  const Settings settings_;
  Corpus corpus_;
  Blend blend_;
  std::vector<std::unique_ptr<Text>> texts_;
  std::vector<Node> nodes_;
  std::vector<Matches> matches_;
  std::vector<int64_t> heap_, index_;
  std::vector<Joined> joined_;
  std::vector<Candidate> children_;

  void extend(Text& text, const int64_t* tokens, int64_t count) {
    for (int64_t i = 0; i < count; i++) text.own.extend(tokens[i], settings_.max_links);
    if (!corpus_.size()) return;
    const int64_t start = std::max<int64_t>(0, count - Corpus::MOST);
    if (start) text.found = 0;
    for (int64_t i = start; i < count; i++) {
      Place found[Corpus::MOST];
      text.found = corpus_.follow(text.places, text.found, tokens[i], found);
      std::copy(found, found + text.found, text.places);
    }
  }

  // Best first: the best candidate joins the tree, its children become candidates.
  void grow(const Text& text, const Request& request) {
    const size_t base = joined_.size();
    nodes_.clear();
    heap_.clear();
    index_.clear();
    matches_.clear();
    Matches whole;
    whole.state = text.own.repeated_suffix();
    whole.length = text.own.state(whole.state).length;
    whole.found = text.found;
    std::copy(text.places, text.places + text.found, whole.places);
    const int64_t shared = text.found ? text.places[0].length : 0;
    if (std::max(whole.length, shared) < settings_.least) return;
    matches_.push_back(whole);
    nodes_.push_back(Node{-1, -1, 0, 1.0, 0});
    index_.push_back(-1);
    // Of two nodes as likely the earlier is the better.
    const auto worse = [this](int64_t a, int64_t b) {
      const double x = nodes_[a].survival, y = nodes_[b].survival;
      return x < y || (x == y && a > b);
    };
    int64_t node = 0;
    while (request.depth && (int64_t)(joined_.size() - base) < request.budget) {
      if (nodes_[node].depth < request.depth) {
        expand(text, node, request.width);
        for (const Candidate& child : children_) {
          const double above = nodes_[node].survival, own = above * child.share;
          const int64_t depth = nodes_[node].depth + 1;
          nodes_.push_back(Node{child.token, node, depth, own < above ? own : above, -1});
          index_.push_back(-1);
          heap_.push_back((int64_t)nodes_.size() - 1);
          std::push_heap(heap_.begin(), heap_.end(), worse);
        }
      }
      if (heap_.empty()) break;
      std::pop_heap(heap_.begin(), heap_.end(), worse);
      node = heap_.back();
      heap_.pop_back();
      index_[node] = (int64_t)(joined_.size() - base);
      const Node& best = nodes_[node];
      joined_.push_back(Joined{best.token, index_[best.parent], best.depth, best.survival});
    }
  }

  // Candidates of a node, best first, into children_.
  void expand(const Text& text, int64_t number, int64_t width) {
    Node& node = nodes_[number];
    if (number) {
      node.matches = (int64_t)matches_.size();
      matches_.emplace_back();
      Matches& here = matches_.back();
      const Matches& above = matches_[nodes_[node.parent].matches];
      here.state = above.state;
      here.length = above.length;
      text.own.step(here.state, here.length, node.token);
      here.found = 0;
      if (corpus_.size())
        here.found = corpus_.follow(above.places, above.found, node.token, here.places);
    }
    blend_.begin();
    blend_matches(text.own, matches_[node.matches]);
    std::vector<Candidate>& all = blend_.candidates;
    const auto better = [](const Candidate& a, const Candidate& b) { return a.share > b.share; };
    children_.clear();
    for (int64_t taken = 0; taken < width && taken < (int64_t)all.size(); taken++) {
      // The first of the best; those before it move up, so that ties stay in order.
      auto best = all.begin() + taken;
      for (auto it = best + 1; it < all.end(); ++it)
        if (better(*it, *best)) best = it;
      std::rotate(all.begin() + taken, best, best + 1);
      const Candidate& found = all[taken];
      if (!(node.survival * found.share >= settings_.min_survival)) break;
      children_.push_back(found);
    }
  }

  // All matches, longest first; the request's own text wins ties.
  void blend_matches(const Automaton& own, const Matches& at) {
    int32_t state = at.state;
    int64_t length = at.length, place = 0;
    for (int64_t i = 0; i < settings_.max_matches; i++) {
      const int64_t mine = length >= settings_.least ? length : 0;
      const bool has_place = place < at.found && at.places[place].length >= settings_.least;
      const int64_t shared = has_place ? at.places[place].length : 0;
      Follower found[Corpus::CAPACITY];
      bool goes_on;
      if (shared > mine) {
        const int64_t size = corpus_.followers(at.places[place++], found);
        goes_on = blend_.add(found, size, -1, shared, settings_.shared_doubt);
      } else if (mine) {
        int64_t newest = -1;
        const int64_t size = followers_in(own, state, found, newest);
        goes_on = blend_.add(found, size, newest, mine, settings_.doubt);
        state = own.state(state).link;
        length = state < 0 ? 0 : own.state(state).length;
      } else {
        return;
      }
      if (!goes_on) return;
    }
  }

  // What follows a state; where that is much, the most frequent, most frequent first.
  int64_t followers_in(const Automaton& own, int32_t state, Follower* found, int64_t& newest) const {
    const int64_t most = settings_.max_followers;
    int32_t latest[Corpus::CAPACITY];
    int64_t size = 0;
    const bool is_ranked = positive_edges(own, state) > most;
    for (int32_t e = own.state(state).first; e >= 0; e = own.edge(e).next) {
      const Edge& edge = own.edge(e);
      if (edge.token < 0) continue;
      const State& child = own.state(edge.child);
      int64_t at = size;
      if (is_ranked)
        while (at > 0 && found[at - 1].count < child.count) at--;
      if (at >= most) continue;
      if (size < most) size++;
      for (int64_t i = size - 1; i > at; i--) {
        found[i] = found[i - 1];
        latest[i] = latest[i - 1];
      }
      found[at] = Follower{edge.token, child.count};
      latest[at] = child.latest;
    }
    if (size) newest = found[std::max_element(latest, latest + size) - latest].token;
    return size;
  }

  static int64_t positive_edges(const Automaton& own, int32_t state) {
    int64_t count = 0;
    for (int32_t e = own.state(state).first; e >= 0; e = own.edge(e).next)
      count += own.edge(e).token >= 0;
    return count;
  }
};

// What `body` gives, or `failed` where memory ends.
template <typename Body>
static int64_t guarded(int64_t failed, const Body& body) {
  try {
    return body();
  } catch (const std::exception&) {
    return failed;
  }
}

extern "C" {

// Null where the settings are beyond what there is room for, or memory ends.
void* dspark_lookup_open(const Settings* settings) {
  const bool fits = settings->max_followers > 0 && settings->max_followers <= Corpus::CAPACITY &&
                    settings->max_matches > 0 && settings->max_matches <= Corpus::CAPACITY &&
                    settings->sample > 0 && settings->least > 0 && settings->corpus_size >= 0;
  Lookup* made = nullptr;
  if (fits) guarded(0, [&] { return made = new Lookup(*settings), 0; });
  return made;
}

void dspark_lookup_close(void* lookup) { delete (Lookup*)lookup; }

// -2: memory ends.
int64_t dspark_lookup_add(void* lookup) {
  return guarded(-2, [&] { return ((Lookup*)lookup)->add_text(); });
}

void dspark_lookup_drop(void* lookup, int64_t text) { ((Lookup*)lookup)->drop_text(text); }

int64_t dspark_lookup_run(void* lookup, int64_t count, const Request* asked, const int64_t* tokens,
                          int64_t size, int64_t* ends) {
  return guarded(-2, [&] { return ((Lookup*)lookup)->run(count, asked, tokens, size, ends); });
}

void dspark_lookup_take(void* lookup, int64_t* token, int64_t* parent, int64_t* depth,
                        double* survival) {
  ((Lookup*)lookup)->take(token, parent, depth, survival);
}
}

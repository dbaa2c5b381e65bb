// Reads the sorted places of dspark/draft/corpus.py: three words a place, three tokens a word.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

struct Place {
  int64_t first, end, prefix;  // range of places, and the last tokens as far as they share a word
  int64_t length;
};

struct Follower {
  int64_t token, count;
};

class Corpus {
 public:
  static constexpr int64_t BITS = 21, PER_WORD = 3, WORDS = 3;
  static constexpr int64_t MASK = (1 << BITS) - 1, MOST = PER_WORD * WORDS - 1;
  static constexpr int64_t CAPACITY = 16;  // followers of one range

  Corpus(const int64_t* const* words, int64_t size, int64_t most, int64_t sample)
      : size_(size), most_(most), sample_(sample) {
    std::copy(words, words + WORDS, words_);
    for (int64_t row = 0; row < size; row += STRIDE) signposts_.push_back(words_[0][row]);
    for (int64_t row = 0; row < size; row++) {
      const uint64_t code = (uint64_t)words_[0][row] >> BITS * (PER_WORD - 1);
      if (begins_.size() <= code) begins_.resize(code + 1, row);
    }
    begins_.push_back(size);
  }

  int64_t size() const { return size_; }

  // Lengthens matches by a token; `found` has room for MOST, and may not be `places`.
  int64_t follow(const Place* places, int64_t count, int64_t token, Place* found) const {
    int64_t made = 0;
    if (token < 0 || token >= MASK) return 0;  // no text has it
    for (int64_t i = 0; i < count; i++)
      if (places[i].length < MOST) made += narrow(places[i], token, found[made]);
    return made + single(token, found[made]);
  }

  // What follows a range, the most frequent first, the smaller token first among equals; returns
  // how many. The ends of texts are left out.
  int64_t followers(const Place& place, Follower* found) {
    if (place.end - place.first <= FEW) return counted(place, found);
    if (kept_.empty()) kept_.resize(KEPT);
    const uint64_t mixed = ((uint64_t)place.first * 16 + (uint64_t)place.length) * 0x9E3779B97F4A7C15u;
    Kept& kept = kept_[mixed >> (64 - KEPT_BITS)];
    if (kept.first != place.first || kept.length != place.length) {
      kept.size = counted(place, kept.found);
      kept.first = place.first;
      kept.length = place.length;
    }
    std::copy(kept.found, kept.found + kept.size, found);
    return kept.size;
  }

 private:
  static constexpr int64_t FEW = 32;  // occurrences that are counted anew each time
  static constexpr int64_t KEPT_BITS = 13, KEPT = 1 << KEPT_BITS;
  static constexpr int64_t NEAR = 32;    // rows within which a range mostly ends
  static constexpr int64_t STRIDE = 16;  // rows from signpost to signpost: two lines of a cache

  struct Kept {
    int64_t first = -1, length = 0, size = 0;
    Follower found[CAPACITY];
  };

  const int64_t* words_[WORDS];
  int64_t size_, most_, sample_;
  std::vector<Kept> kept_;
  std::vector<int64_t> begins_;     // first row of each token, counted from 1, and one behind all
  std::vector<int64_t> signposts_;  // of the first word, whose ranges are the large ones

  // First of the values [low, high) that is not below one; without branches that must be guessed.
  static int64_t bisect(const int64_t* values, int64_t low, int64_t high, int64_t value) {
    int64_t count = high - low;
    if (count <= 0) return low;
    while (count > 1) {
      const int64_t half = count / 2;
      low += values[low + half - 1] < value ? half : 0;
      count -= half;
    }
    return low + (values[low] < value);
  }

  // First of rows [low, high) whose word is not below the value.
  int64_t first_not_below(int64_t word, int64_t low, int64_t high, int64_t value) const {
    const int64_t* values = words_[word];
    if (word == 0 && high - low > 4 * STRIDE) {
      const int64_t first = (low + STRIDE - 1) / STRIDE, last = (high - 1) / STRIDE + 1;
      const int64_t post = bisect(signposts_.data(), first, last, value);
      if (post > first) low = (post - 1) * STRIDE + 1;
      if (post < last) high = post * STRIDE;
    }
    return bisect(values, low, high, value);
  }

  // Places of one token.
  int64_t single(int64_t token, Place& found) const {
    if (token + 2 >= (int64_t)begins_.size()) return 0;
    found = Place{begins_[token + 1], begins_[token + 2], token + 1, 1};
    return found.first < found.end;
  }

  int64_t narrow(const Place& place, int64_t token, Place& found) const {
    const int64_t word = place.length / PER_WORD, part = place.length % PER_WORD;
    const int64_t prefix = (part ? place.prefix << BITS : 0) | (token + 1);
    const int64_t spare = BITS * (PER_WORD - 1 - part);
    const int64_t* values = words_[word];
    const int64_t start = first_not_below(word, place.first, place.end, prefix << spare);
    const int64_t after = (prefix + 1) << spare;
    if (start == place.end || values[start] >= after) return 0;
    const int64_t near = std::min(place.end, start + NEAR);
    const bool is_near = near == place.end || values[near] >= after;
    const int64_t stop = is_near ? first_not_below(word, start + 1, near, after)
                                 : first_not_below(word, near + 1, place.end, after);
    found = Place{start, stop, prefix, place.length + 1};
    return 1;
  }

  // First of rows start, start + step, ... below `end` that is not inside; the first one is, and
  // those that are stand together. Doubling steps first: most runs are short.
  template <typename Inside>
  static int64_t end_of_run(int64_t start, int64_t end, int64_t step, const Inside& inside) {
    const int64_t count = (end - start + step - 1) / step;
    int64_t low = 0, high = 1;  // low is inside
    while (high < count && inside(start + high * step)) {
      low = high;
      high *= 2;
    }
    high = std::min(high, count);
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (inside(start + middle * step) ? low : high) = middle;
    }
    return start + high * step;
  }

  int64_t counted(const Place& place, Follower* found) const {
    const int64_t* values = words_[place.length / PER_WORD];
    const int64_t shift = BITS * (PER_WORD - 1 - place.length % PER_WORD);
    const int64_t step = (place.end - place.first + sample_ - 1) / sample_;
    const auto token_at = [&](int64_t row) { return (values[row] >> shift) & MASK; };
    int64_t size = 0;
    for (int64_t row = place.first; row < place.end;) {
      const int64_t token = token_at(row);
      int64_t next = row + step;
      if (next < place.end && token_at(next) == token)
        next = end_of_run(next, place.end, step, [&](int64_t r) { return token_at(r) == token; });
      if (token) size = keep_best(found, size, Follower{token - 1, next - row});
      row = next;
    }
    return size;
  }

  // Inserts behind those that are as frequent, in falling order.
  int64_t keep_best(Follower* found, int64_t size, Follower added) const {
    int64_t at = size;
    while (at > 0 && found[at - 1].count < added.count) at--;
    if (at >= most_) return size;
    if (size < most_) size++;
    for (int64_t i = size - 1; i > at; i--) found[i] = found[i - 1];
    found[at] = added;
    return size;
  }
};

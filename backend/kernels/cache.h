// The paged cache of keys and values, and what one step needs to know about its requests.
//
// A page is 16 tokens of one layer, in the order in which the micro-kernel reads weights: for
// scores the 16 lanes are the tokens of a page, for the weighted sum of values they are columns.
//
//   keys    [num_kv_heads][key_words][16 tokens] words
//   values  [num_kv_heads][16 / (values per word)][value_columns] words
//
// The pages of all layers that hold the same tokens stand together, so that memory is used, and
// taken from the system, in the order in which blocks are.
//
// key_words is key_size in words, rounded up; a word of keys holds consecutive elements of one
// token. value_columns is value_size rounded up to 16; a word of values holds one column of
// consecutive tokens. What is padded is zero from the start and never written.
#pragma once

#include "tile.h"
#include "words.h"

constexpr int page_tokens = simd::lanes;

// What Python prepares once per layer.
struct LayerCache {
  word* keys;           // of the layer's first page
  word* values;
  int64_t page_stride;  // words from one page of this layer to the next
  int32_t num_kv_heads;
  int32_t key_size;
  int32_t value_size;
  int32_t type;  // see `Type` in words.h
};

// What Python prepares once per step.
struct StepTables {
  const int64_t* slots;         // [num_tokens], page * 16 + offset of each token
  const int32_t* query_starts;  // [num_requests + 1], first row of each request
  const int32_t* context_lens;  // [num_requests], tokens in the cache after this step's writes
  const int32_t* block_tables;  // [num_requests, table_stride] block ids, padded with anything
  int32_t num_tokens;
  int32_t num_requests;
  int32_t table_stride;
  int32_t pages_per_block;
};

// One layer's cache, its numbers being of type E.
template <class E>
struct Pages {
  static constexpr int values_per_word = sizeof(word) / sizeof(E);

  word* keys;
  word* values;
  size_t page_stride;
  int num_kv_heads, key_size, value_size, key_words, value_columns;
  size_t key_page_words, value_page_words;  // of one head

  explicit Pages(const LayerCache& cache)
      : keys(cache.keys),
        values(cache.values),
        page_stride(cache.page_stride),
        num_kv_heads(cache.num_kv_heads),
        key_size(cache.key_size),
        value_size(cache.value_size),
        key_words((cache.key_size + values_per_word - 1) / values_per_word),
        value_columns((cache.value_size + simd::lanes - 1) / simd::lanes * simd::lanes),
        key_page_words(static_cast<size_t>(key_words) * page_tokens),
        value_page_words(static_cast<size_t>(value_columns) * page_tokens / values_per_word) {}

  word* key_page(int64_t page, int head) const {
    return keys + page * page_stride + head * key_page_words;
  }
  word* value_page(int64_t page, int head) const {
    return values + page * page_stride + head * value_page_words;
  }

  // Write one token's key and value of one head. Only what belongs to the token is written, so
  // that threads may write to the same page.
  //
  // Non-finite numbers are replaced, as torch.nan_to_num does. Whoever gets the page next hides
  // what is left in it behind a weight of zero, and zero times NaN is NaN. The request itself is
  // told all the same: its queries are not finite either.
  void write(int64_t slot, int head, const E* key, const E* value) const {
    using namespace simd;
    constexpr int P = values_per_word;
    int64_t page = slot / page_tokens;
    int offset = static_cast<int>(slot % page_tokens);
    alignas(64) word buffer[lanes];
    E* numbers = reinterpret_cast<E*>(buffer);

    word* to = key_page(page, head) + offset;
    for (int d = 0; d < key_size; d += lanes) {
      int count = std::min(lanes, key_size - d);
      store(numbers, finite<E>(load(key + d, count)));
      for (int i = 0; i < (count + P - 1) / P; ++i) to[(d / P + i) * page_tokens] = buffer[i];
    }
    E* column = reinterpret_cast<E*>(value_page(page, head) + offset / P * value_columns);
    for (int d = 0; d < value_size; d += lanes) {
      int count = std::min(lanes, value_size - d);
      store(P == 1 ? column + d : numbers, finite<E>(load(value + d, count)), count);
      if (P == 1) continue;
      for (int i = 0; i < count; ++i) column[(d + i) * P + offset % P] = numbers[i];
    }
  }
};

// Write keys and values of all tokens of a step. Strides are in numbers.
template <class E>
void write_kv(const LayerCache& cache, const StepTables& step, const E* key,
              size_t key_token_stride, size_t key_head_stride, const E* value,
              size_t value_token_stride, size_t value_head_stride) {
  Pages<E> pages(cache);
#pragma omp parallel for schedule(static) if (step.num_tokens > 8)
  for (int t = 0; t < step.num_tokens; ++t)
    for (int h = 0; h < pages.num_kv_heads; ++h)
      pages.write(step.slots[t], h, key + t * key_token_stride + h * key_head_stride,
                  value + t * value_token_stride + h * value_head_stride);
}

// Paged attention (Kwon et al., SOSP '23, section 4.1) with an online softmax (Milakov and
// Gimelshein 2018; Dao et al. 2022) over blocks of keys.
//
// Blocks of keys are cut at multiples of 256 of the key's position, whatever the chunk, the
// batch or the window; within a block keys are summed in ascending order, in lanes given by
// position. A key that a query cannot see has the weight zero, exactly, and leaves sums as they
// are. So a query's result depends on nothing but its own keys.
#pragma once

#include <vector>

#include "cache.h"

struct AttentionOptions {
  float scale;
  int32_t window;      // a token sees itself and window - 1 before it; 0: all
  float softcap;       // 0: none
  const float* sinks;  // [num_heads], or null
};

constexpr int block_keys = 256;

// Rows (tokens x heads that share a key head) of one tile of queries. Keys and values of a block
// are read once for all of them.
constexpr int query_rows = 48;

// Memory of one thread for one tile of queries, allocated once and kept.
struct AttentionScratch {
  std::vector<word> queries;        // [rows][key_words]
  std::vector<float> scores;        // [rows][block_keys]
  std::vector<word> probabilities;  // [rows][block_keys / values per word]
  std::vector<float> results;       // [rows][value_columns]
  std::vector<float> weights;       // [rows][16], sums of probabilities per lane
  std::vector<float> tops;          // [rows], the largest score so far

  void reset(size_t rows, size_t key_words, size_t value_columns, size_t block_words) {
    zero(queries, rows * key_words);
    zero(results, rows * value_columns);
    zero(weights, rows * simd::lanes);
    scores.resize(std::max(scores.size(), rows * block_keys));
    probabilities.resize(std::max(probabilities.size(), rows * block_words));
    tops.assign(rows, -simd::infinity);
  }

 private:
  template <class T>
  static void zero(std::vector<T>& v, size_t count) {
    v.resize(std::max(v.size(), count));
    std::memset(v.data(), 0, count * sizeof(T));
  }
};

// The queries of some consecutive tokens of one request, for all heads that read one key head.
template <class E>
struct QueryTile {
  using Words = typename WordsOf<E>::Type;
  static constexpr int values_per_word = sizeof(word) / sizeof(E);
  static constexpr int block_words = block_keys / values_per_word;

  const Pages<E>& pages;
  const AttentionOptions& options;
  AttentionScratch& scratch;
  const int32_t* block_table;
  int pages_per_block;
  int kv_head;
  int heads;     // per key head; row r is token r / heads, head r % heads
  int rows;
  int position;  // of the first token

  // The pages of a block of keys.
  int num_pages = 0;
  const word* key_pages[block_keys / page_tokens + panel_groups] = {};
  const word* value_pages[block_keys / page_tokens] = {};

  int position_of(int row) const { return position + row / heads; }

  void attend() {
    int end = position_of(rows - 1) + 1;
    int first = options.window > 0 ? std::max(0, position - options.window + 1) : 0;
    for (int block = first / block_keys * block_keys; block < end; block += block_keys) {
      int first_page = std::max(first, block) / page_tokens;
      int last_page = (std::min(end, block + block_keys) + page_tokens - 1) / page_tokens;
      look_up_pages(first_page, last_page);
      compute_scores(first_page * page_tokens);
      compute_probabilities();
      add_values();
    }
  }

  void look_up_pages(int first_page, int last_page) {
    num_pages = last_page - first_page;
    for (int i = 0; i < num_pages; ++i) {
      int page = first_page + i;
      int64_t block = block_table[page / pages_per_block];
      int64_t id = block * pages_per_block + page % pages_per_block;
      key_pages[i] = pages.key_page(id, kv_head);
      value_pages[i] = pages.value_page(id, kv_head);
    }
    // The last panel works on the last page several times, and nobody looks at the result.
    for (int i = num_pages; i < num_pages + panel_groups; ++i) key_pages[i] = key_pages[i - 1];
  }

  // scores[r][i] of the keys in these pages; -infinity where the query does not see the key.
  void compute_scores(int first_key) {
    for (int page = 0; page < num_pages; page += panel_groups) {
      for (int row = 0, height; row < rows; row += height) {
        height = balanced_tile(rows - row);
        with_rows(height, [&](auto constant) __attribute__((always_inline)) {
          multiply_keys<decltype(constant)::value>(row, page, first_key);
        });
      }
    }
  }

  template <int ROWS>
  INLINE void multiply_keys(int row, int first_page, int first_key) {
    using namespace simd;
    constexpr int V = tile_vectors;
    const word* queries = &scratch.queries[static_cast<size_t>(row) * pages.key_words];
    for (int page = first_page; page < first_page + panel_groups; page += V) {
      F32 score[ROWS][V];
      UNROLL
      for (int r = 0; r < ROWS; ++r)
        UNROLL
        for (int j = 0; j < V; ++j) score[r][j] = zeros();
      NothingAhead nothing;
      multiply_add<Words, ROWS, V>(score, queries, pages.key_words, key_pages + page, page_tokens,
                                   pages.key_words, nothing);
      int key = first_key + page * page_tokens;
      for (int r = 0; r < ROWS; ++r) {
        float* to = &scratch.scores[static_cast<size_t>(row + r) * block_keys + page * page_tokens];
        // Of these keys, counted from the first, the row sees first <= key < last.
        int last = position_of(row + r) + 1 - key;
        int first = options.window > 0 ? last - options.window : 0;
        UNROLL
        for (int j = 0; j < V; ++j) {
          F32 s = score[r][j] * broadcast(options.scale);
          if (options.softcap > 0)
            s = broadcast(options.softcap) * tanh(s / broadcast(options.softcap));
          if (first > j * lanes || last < (j + 1) * lanes)
            s = keep_lanes(s, first - j * lanes, last - j * lanes, broadcast(-infinity));
          store(to + j * lanes, s);
        }
      }
    }
  }

  // Scores become probabilities, up to a factor that is made good at the end: relative to the
  // largest score so far. When that grows, what was summed before shrinks.
  void compute_probabilities() {
    using namespace simd;
    for (int r = 0; r < rows; ++r) {
      const float* scores = &scratch.scores[static_cast<size_t>(r) * block_keys];
      E* probabilities = reinterpret_cast<E*>(&scratch.probabilities[r * block_words]);
      float* weights = &scratch.weights[r * lanes];
      F32 largest = broadcast(scratch.tops[r]);
      for (int i = 0; i < num_pages * lanes; i += lanes) largest = max(largest, load(scores + i));
      float top = maximum(largest);
      if (top == -infinity) {  // this row sees nothing yet
        for (int i = 0; i < num_pages * lanes; i += lanes) store(probabilities + i, zeros());
        continue;
      }
      F32 weight = load(weights);
      if (top != scratch.tops[r]) {
        F32 shrink = exp(broadcast(scratch.tops[r] - top));
        weight = weight * shrink;
        float* result = &scratch.results[static_cast<size_t>(r) * pages.value_columns];
        for (int i = 0; i < pages.value_columns; i += lanes)
          store(result + i, load(result + i) * shrink);
        scratch.tops[r] = top;
      }
      for (int i = 0; i < num_pages * lanes; i += lanes) {
        F32 p = exp(load(scores + i) - broadcast(top));
        weight = weight + p;
        store(probabilities + i, p);
      }
      store(weights, weight);
    }
  }

  // results[r] += probabilities[r] . values
  void add_values() {
    for (int column = 0; column < pages.value_columns; column += panel_columns) {
      for (int row = 0, height; row < rows; row += height) {
        height = balanced_tile(rows - row);
        with_rows(height, [&](auto constant) __attribute__((always_inline)) {
          multiply_values<decltype(constant)::value>(row, column);
        });
      }
    }
  }

  template <int ROWS>
  INLINE void multiply_values(int row, int first_column) {
    using namespace simd;
    constexpr int V = tile_vectors;
    constexpr int page_words = page_tokens / values_per_word;
    int end = std::min(first_column + panel_columns, pages.value_columns);
    for (int column = first_column; column < end; column += V * lanes) {
      // A panel that is not full works on its last group several times.
      int columns[V];
      for (int j = 0; j < V; ++j)
        columns[j] = std::min(column + j * lanes, pages.value_columns - lanes);
      float* results = &scratch.results[static_cast<size_t>(row) * pages.value_columns];
      const word* probabilities = &scratch.probabilities[row * block_words];
      F32 sum[ROWS][V];
      UNROLL
      for (int r = 0; r < ROWS; ++r)
        UNROLL
        for (int j = 0; j < V; ++j) sum[r][j] = load(results + r * pages.value_columns + columns[j]);
      for (int page = 0; page < num_pages; ++page) {
        const word* values[V];
        for (int j = 0; j < V; ++j) values[j] = value_pages[page] + columns[j];
        NothingAhead nothing;
        multiply_add<Words, ROWS, V>(sum, probabilities + page * page_words, block_words, values,
                                     pages.value_columns, page_words, nothing);
      }
      UNROLL
      for (int r = 0; r < ROWS; ++r)
        UNROLL
        for (int j = 0; j < V; ++j) store(results + r * pages.value_columns + columns[j], sum[r][j]);
    }
  }
};

// out[num_tokens, num_heads, value_size]; strides of the queries are in numbers.
template <class E>
void paged_attention(const LayerCache& cache, const StepTables& step,
                     const AttentionOptions& options, const E* query, size_t token_stride,
                     size_t head_stride, E* out, int num_heads) {
  using namespace simd;
  Pages<E> pages(cache);
  int heads = num_heads / pages.num_kv_heads;
  int tile_tokens = std::max(1, query_rows / heads);
  struct Item {
    int request, first, last;
  };
  std::vector<Item> items;
  for (int request = 0; request < step.num_requests; ++request) {
    int end = step.query_starts[request + 1];
    for (int t = step.query_starts[request]; t < end; t += tile_tokens)
      items.push_back({request, t, std::min(t + tile_tokens, end)});
  }
  int count = static_cast<int>(items.size()) * pages.num_kv_heads;
  for_each_item(count, [&](int index, int) {
    static thread_local AttentionScratch scratch;
    Item item = items[index / pages.num_kv_heads];
    int kv_head = index % pages.num_kv_heads;
    int tokens_behind = step.query_starts[item.request + 1] - item.first;
    const int32_t* table =
        step.block_tables + static_cast<size_t>(item.request) * step.table_stride;
    QueryTile<E> tile{pages,
                      options,
                      scratch,
                      table,
                      step.pages_per_block,
                      kv_head,
                      heads,
                      (item.last - item.first) * heads,
                      step.context_lens[item.request] - tokens_behind};
    scratch.reset(tile.rows, pages.key_words, pages.value_columns, QueryTile<E>::block_words);
    for (int r = 0; r < tile.rows; ++r) {
      int head = kv_head * heads + r % heads;
      std::memcpy(&scratch.queries[static_cast<size_t>(r) * pages.key_words],
                  query + (item.first + r / heads) * token_stride + head * head_stride,
                  pages.key_size * sizeof(E));
      if (options.sinks) {  // a score without a value
        scratch.tops[r] = options.sinks[head];
        scratch.weights[r * lanes] = 1.0f;
      }
    }
    tile.attend();
    for (int r = 0; r < tile.rows; ++r) {
      size_t token = item.first + r / heads;
      E* to = out + (token * num_heads + kv_head * heads + r % heads) * pages.value_size;
      const float* result = &scratch.results[static_cast<size_t>(r) * pages.value_columns];
      F32 inverse = broadcast(1.0f / sum(load(&scratch.weights[r * lanes])));
      for (int i = 0; i < pages.value_size; i += lanes)
        store(to + i, load(result + i) * inverse, std::min(lanes, pages.value_size - i));
    }
  });
}

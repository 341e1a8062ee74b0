/* The kernels of the fake driver: the language model of tests/runtime/packages.py, one call a launch. */
#include "fake_cuda.h"

enum { VOCAB = 23, BLOCK = 4, WINDOW = 6 };

int fake_launches(const Node *nodes, int first, int last) {
  int count = 0;
  for (int i = first; i < last; i++) count += nodes[i].function != NULL;
  return count;
}

#define AT(type, i) ((type *)(uintptr_t)entry->values[i])

static int append(const Entry *entry, const int32_t *dims) {
  const int32_t *token_ids = AT(int32_t, 0), *slot_mapping = AT(int32_t, 1);
  for (int t = 0; t < (int)entry->grid[0]; t++) { /* the whole bucket: padding has slots that say so, and zeros */
    if (t >= dims[0] && (slot_mapping[t] != -1 || token_ids[t] != 0)) return LAUNCH_FAILED;
    if (t < dims[0]) AT(float, 2)[slot_mapping[t]] = (float)token_ids[t];
  }
  return 0;
}

/* With a window: added to what is there already. */
static int mix(const Entry *entry, const int32_t *dims, int decode, int window) {
  const int32_t *positions = AT(int32_t, 0), *query_start = AT(int32_t, 1), *block_tables = AT(int32_t, 2);
  const float *state = AT(float, 3), *history = AT(float, 4);
  for (int s = 0; s < dims[1]; s++)
    for (int t = decode ? s : query_start[s]; t < (decode ? s + 1 : query_start[s + 1]); t++)
      for (int v = 0; v < VOCAB; v++) {
        float sum = window ? AT(float, 5)[t * VOCAB + v] : 0;
        for (int p = window && positions[t] >= window ? positions[t] - window + 1 : 0; p <= positions[t]; p++)
          sum += history[(int)state[block_tables[s * dims[2] + p / BLOCK] * BLOCK + p % BLOCK] * VOCAB + v];
        AT(float, 5)[t * VOCAB + v] = sum;
      }
  return 0;
}

static int gather(const Entry *entry, const int32_t *dims) {
  for (int t = 0; t < dims[0]; t++)
    memcpy(AT(float, 2) + t * VOCAB, AT(float, 1) + AT(int32_t, 0)[t] * VOCAB, VOCAB * sizeof(float));
  return 0;
}

static int head(const Entry *entry, const int32_t *dims) {
  if (AT(int32_t, 5)[0] != 0) return LAUNCH_FAILED; /* a ticket that nobody has zeroed */
  AT(float, 4)[0] = 1;
  for (int o = 0; o < dims[3]; o++)
    for (int v = 0; v < VOCAB; v++) {
      int at = AT(int32_t, 0)[o] * VOCAB + v;
      AT(float, 3)[o * VOCAB + v] = AT(float, 1)[at] + AT(float, 2)[at];
    }
  return 0;
}

/* The first maximum; and what tells whether all words of `sampling` have arrived, where it asks for a draw. */
static int select_token(const Entry *entry, const int32_t *dims) {
  for (int o = 0; o < dims[3]; o++) {
    const float *logits = AT(float, 0) + o * VOCAB;
    const int32_t *how = AT(int32_t, 1) + 8 * o;
    int best = 0;
    for (int v = 1; v < VOCAB; v++)
      if (logits[v] > logits[best]) best = v;
    AT(int32_t, 2)[o] = best;
    uint32_t sum = 0;
    for (int i = 0; i < 8; i++) sum = 31 * sum + (uint32_t)how[i];
    AT(int32_t, 3)[o] = how[0] == 0 ? best : logits[0] != logits[0] ? -1 : (int32_t)(sum % VOCAB);
  }
  return 0;
}

/* A product that is only timed: its tickets must be zero, and its rows counted. */
static int timed(const Entry *entry, const int32_t *dims) {
  return AT(int32_t, entry->arguments - 4)[0] == 0 && dims[0] > 0 ? 0 : LAUNCH_FAILED;
}

int fake_kernel(const char *name, const Entry *entry) {
  const int32_t *dims = AT(int32_t, entry->arguments - 3);
  if (strcmp(name, "append_fn") == 0) return append(entry, dims);
  if (strcmp(name, "mix_fn") == 0) return mix(entry, dims, 0, 0);
  if (strcmp(name, "mix_decode_fn") == 0) return mix(entry, dims, 1, 0);
  if (strcmp(name, "recent_fn") == 0) return mix(entry, dims, 0, WINDOW);
  if (strcmp(name, "recent_decode_fn") == 0) return mix(entry, dims, 1, WINDOW);
  if (strcmp(name, "gather_fn") == 0) return gather(entry, dims);
  if (strcmp(name, "head_fn") == 0) return head(entry, dims);
  if (strcmp(name, "select_token_fn") == 0) return select_token(entry, dims);
  if (strcmp(name, "timed_fn") == 0) return timed(entry, dims);
  return LAUNCH_FAILED;
}

/* What was compiled for a GPU computes nothing here: whatever it chooses from, it chooses token 0. */
int fake_compiled(const char *name, const Entry *entry) {
  const int32_t *dims = AT(int32_t, entry->arguments - 3);
  if (strncmp(name, "select_token_", 13) != 0) return 0;
  for (int o = 0; o < dims[3]; o++) AT(int32_t, 2)[o] = AT(int32_t, 3)[o] = 0;
  return 0;
}

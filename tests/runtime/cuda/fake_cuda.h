/* Types of the fake CUDA driver, and the kernels that it knows by name. */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum {
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  NO_BINARY = 209,
  INVALID_PTX = 218,
  NOT_FOUND = 500,
  ILLEGAL_ADDRESS = 700,
  LAUNCH_FAILED = 719,
  CAPTURE_UNSUPPORTED = 900
};
enum { STARTED = 1, CONTEXT = 2, NOT_IN_CAPTURE = 4 };
enum { DEVICE, HOST, MODULE, OTHER };

typedef struct {
  int32_t id, padding;
  union {
    char bytes[64];
    int32_t allowed;
  } value;
} Attribute;

typedef struct {
  uint32_t grid[3], block[3], shared;
  void *stream;
  Attribute *attributes;
  uint32_t attribute_count;
} Config;

/* One call in the log. A launch has a name, a grid and arguments, a copy has addresses; both have a stream. */
typedef struct {
  char call[32], name[64];
  uint32_t grid[3], block[3], shared;
  int32_t dependent, captured, replayed, arguments, padding;
  uint64_t values[32], stream, destination, source, bytes;
} Entry;

typedef struct {
  uint64_t address, size;
  int kind;
} Region;

typedef struct {
  char name[64];
  int parameters, compiled; /* compiled: checked and logged, but nothing is computed */
  uint32_t shared;
} Function;

typedef struct Graph Graph;
typedef struct {
  Entry entry;
  const Function *function;
  const Graph *graph;
  int fill;
} Node;
struct Graph {
  Node *nodes;
  int count;
  void *stream;
};

int fake_capability(int major);
int fake_launches(const Node *nodes, int first, int last);
int fake_module(const char *image, Function *function);
int fake_kernel(const char *name, const Entry *entry);
int fake_compiled(const char *name, const Entry *entry);

#endif

/* Starts the launches and copies of a step through the CUDA driver: one call from Python for all of them.
 *
 * The driver's functions come as a table from Python, which has opened the driver. So this file needs no CUDA header, no
 * dlopen and no library but libc, holds no state, and copies of it in one process do not meet. Where it cannot be loaded,
 * cuda_launch.py does the same with ctypes.
 */
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* The driver's CUlaunchAttribute and CUlaunchConfig: 72 and 56 bytes since CUDA 11.8. */
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

_Static_assert(sizeof(Attribute) == 72 && offsetof(Attribute, value) == 8, "CUlaunchAttribute");
_Static_assert(sizeof(Config) == 56 && offsetof(Config, stream) == 32, "CUlaunchConfig");

enum { PROGRAMMATIC_STREAM_SERIALIZATION = 6 };

typedef struct {
  int (*launch)(const Config *config, void *function, void **parameters, void **extra);
  int (*to_device)(uint64_t destination, const void *source, size_t bytes, void *stream);
  int (*to_host)(void *destination, uint64_t source, size_t bytes, void *stream);
  int (*on_device)(uint64_t destination, uint64_t source, size_t bytes, void *stream);
  int (*push)(void *context);
  int (*pop)(void **context);
  int (*replay)(void *graph, void *stream);
  int (*synchronize)(void *stream);
} Driver;

/* A launch of `function` with `parameters`, pointers to its arguments, or a copy. Beside cuda_launch.Operation. */
typedef struct {
  int32_t kind;
  uint32_t grid[3], threads, shared, dependent, padding;
  void *function;
  void **parameters;
  uint64_t destination, source, bytes;
} Operation;

enum { LAUNCH, TO_DEVICE, TO_HOST, ON_DEVICE };

EXPORT const char *llmc_cuda_build(void) { return "llmc-cuda 1"; }

static int start(const Driver *driver, const Operation *o, void *stream) {
  switch (o->kind) {
    case LAUNCH: {
      Attribute attribute = {PROGRAMMATIC_STREAM_SERIALIZATION, 0, {{0}}};
      attribute.value.allowed = 1;
      Config config = {{o->grid[0], o->grid[1], o->grid[2]}, {o->threads, 1, 1}, o->shared, stream, &attribute, o->dependent};
      return driver->launch(&config, o->function, o->parameters, NULL);
    }
    case TO_DEVICE: return driver->to_device(o->destination, (const void *)(uintptr_t)o->source, o->bytes, stream);
    case TO_HOST: return driver->to_host((void *)(uintptr_t)o->destination, o->source, o->bytes, stream);
    default: return driver->on_device(o->destination, o->source, o->bytes, stream);
  }
}

/* Starts operations first..last in a stream, in the current context. Returns 0, or the CUresult of operation *failed. */
EXPORT int llmc_cuda_run(const Driver *driver, const Operation *operations, int32_t first, int32_t last, void *stream,
                         int32_t *failed) {
  for (int32_t i = first; i < last; i++) {
    int result = start(driver, &operations[i], stream);
    if (result != 0) {
      *failed = i;
      return result;
    }
  }
  return 0;
}

/* Runs a graph in a stream and waits for it. Returns 0, or the CUresult of what failed: 0 making the context current,
 * 1 starting the graph, 2 waiting. The context that was current before is current again. */
EXPORT int llmc_cuda_replay(const Driver *driver, void *context, void *graph, void *stream, int32_t *failed) {
  *failed = 0;
  int result = driver->push(context);
  if (result != 0) return result;
  *failed = 1;
  result = driver->replay(graph, stream);
  if (result == 0) {
    *failed = 2;
    result = driver->synchronize(stream);
  }
  void *popped;
  int last = driver->pop(&popped);
  return result != 0 ? result : last;
}

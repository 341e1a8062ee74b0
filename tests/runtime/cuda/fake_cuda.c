/* A CUDA driver for machines without one: real memory, a log of every call, and a few kernels by name (fake_kernels.h).
 *
 * What is started in a stream waits in a queue until something waits for it, as late as a real GPU may be. Calls without
 * a current context, copies outside of allocations, and arguments that point nowhere fail as they do on a GPU.
 * Configured by the environment: FAKE_CUDA_DEVICES, _CAPABILITY (9.0), _FREE (bytes), _DRIVER (12080), and
 * _FAIL (function:n:code, the n-th call of it since fake_reset fails). -DOLD_DRIVER leaves out cuLaunchKernelEx.
 */
#include "fake_cuda.h"

#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Entry *entries;
static int entry_count, init_process, retained, sticky;
static __thread void *contexts[16];
static __thread int depth;
static Region regions[1024];
static uint64_t taken;
static Node *queue;
static int queued, done;
static uint64_t now;
static Graph *capturing;

static uint64_t setting(const char *name, uint64_t otherwise) {
  const char *value = getenv(name);
  return value != NULL && *value ? strtoull(value, NULL, 10) : otherwise;
}

EXPORT void fake_reset(void) {
  entry_count = sticky = queued = done = 0;
  capturing = NULL;
}
/* Forgets everything, as a new process would. */
EXPORT void fake_restart(void) {
  fake_reset();
  memset(regions, 0, sizeof regions);
  taken = 0;
  retained = init_process = depth = 0;
}
EXPORT int fake_count(void) { return entry_count; }
EXPORT const Entry *fake_entry(int i) { return &entries[i]; }
EXPORT int fake_depth(void) { return depth; }
EXPORT int fake_retained(void) { return retained; }
/* How many allocations of device (0) and pinned (1) memory, modules (2), streams, events, graphs (3) are alive. */
EXPORT int fake_alive(int kind) {
  int count = 0;
  for (int i = 0; i < 1024; i++) count += regions[i].address != 0 && regions[i].kind == kind;
  return count;
}

static Entry *note(const char *call) {
  entries = realloc(entries, (size_t)(entry_count + 1) * sizeof(Entry));
  Entry *entry = &entries[entry_count++];
  memset(entry, 0, sizeof *entry);
  snprintf(entry->call, sizeof entry->call, "%s", call);
  return entry;
}

/* What a call is to fail with: by the environment, for want of a context, after a fault, while a graph is recorded. */
static int begin(const char *call, int needs) {
  note(call);
  int calls = 0;
  for (int i = 0; i < entry_count; i++) calls += !entries[i].replayed && strcmp(entries[i].call, call) == 0;
  const char *fail = getenv("FAKE_CUDA_FAIL");
  size_t length = strlen(call);
  if (fail != NULL && strncmp(fail, call, length) == 0 && fail[length] == ':') {
    int which, code;
    if (sscanf(fail + length, ":%d:%d", &which, &code) == 2 && which == calls) {
      if (code >= 700 && code < 720) sticky = code;
      return code;
    }
  }
  if (init_process == 0 && needs) return NOT_INITIALIZED;
  if (needs & CONTEXT) {
    if (depth == 0 || !retained) return INVALID_CONTEXT;
    if (sticky) return sticky;
  }
  return needs & NOT_IN_CAPTURE && capturing != NULL ? CAPTURE_UNSUPPORTED : 0;
}

static uint64_t keep(int kind, void *address, uint64_t size) {
  for (int i = 0; i < 1024; i++)
    if (regions[i].address == 0) {
      regions[i] = (Region){(uint64_t)(uintptr_t)address, size, kind};
      return regions[i].address;
    }
  abort();
}

static int drop(int kind, uint64_t address) {
  for (int i = 0; i < 1024; i++)
    if (regions[i].address == address && regions[i].kind == kind) {
      if (kind == DEVICE) taken -= regions[i].size;
      free((void *)(uintptr_t)address);
      regions[i].address = 0;
      return 0;
    }
  return INVALID_VALUE;
}

static int inside(int kind, uint64_t address, uint64_t size) {
  for (int i = 0; i < 1024; i++)
    if (regions[i].address != 0 && regions[i].kind == kind && address >= regions[i].address &&
        address + size <= regions[i].address + regions[i].size)
      return 1;
  return 0;
}

static void execute(const Node *node) {
  if (node->graph != NULL) {
    for (int i = 0; i < node->graph->count; i++) {
      Entry *entry = note(node->graph->nodes[i].entry.call);
      *entry = node->graph->nodes[i].entry;
      entry->replayed = 1;
      entry->captured = 0;
      execute(&node->graph->nodes[i]);
    }
  } else if (node->function != NULL) {
    now += 2000;
    int code = (node->function->compiled ? fake_compiled : fake_kernel)(node->function->name, &node->entry);
    if (code) sticky = code;
  } else if (node->entry.bytes != 0) {
    void *destination = (void *)(uintptr_t)node->entry.destination;
    if (node->fill) memset(destination, 0, node->entry.bytes);
    else memcpy(destination, (const void *)(uintptr_t)node->entry.source, node->entry.bytes);
  }
}

static void flush(int until) {
  for (; done < until; done++) execute(&queue[done]);
}

/* Into the stream, or into the graph that it records. */
static int start(Node node, void *stream) {
  Entry *entry = &entries[entry_count - 1];
  node.entry.stream = (uint64_t)(uintptr_t)stream;
  node.entry.captured = capturing != NULL && capturing->stream == stream;
  memcpy(node.entry.call, entry->call, sizeof entry->call);
  *entry = node.entry;
  if (node.entry.captured) {
    capturing->nodes = realloc(capturing->nodes, (size_t)(capturing->count + 1) * sizeof node);
    capturing->nodes[capturing->count++] = node;
  } else {
    queue = realloc(queue, (size_t)(queued + 1) * sizeof node);
    queue[queued++] = node;
  }
  return 0;
}

static int copy(const char *call, uint64_t to, int to_device, uint64_t from, int from_device, uint64_t bytes, void *stream) {
  int code = begin(call, CONTEXT);
  if (code) return code;
  if ((to_device && !inside(DEVICE, to, bytes)) || (from_device && !inside(DEVICE, from, bytes))) return INVALID_VALUE;
  Node node = {.entry = {.destination = to, .source = from, .bytes = bytes}};
  start(node, stream);
  /* Memory that is not pinned is read or written before the call returns. */
  if (!node.entry.captured && ((!to_device && !inside(HOST, to, bytes)) || (!from_device && !inside(HOST, from, bytes))))
    flush(queued);
  return 0;
}

#define CALL(name, needs)         \
  pthread_mutex_lock(&lock);      \
  int code = begin(#name, needs); \
  if (code) goto out;
#define END                   \
  out:                        \
  pthread_mutex_unlock(&lock); \
  return code;

EXPORT int cuInit(unsigned flags) {
  (void)flags;
  CALL(cuInit, 0)
  if (init_process != 0 && init_process != getpid()) code = NOT_INITIALIZED;
  else if (setting("FAKE_CUDA_DEVICES", 1) == 0) code = NO_DEVICE;
  else init_process = getpid();
  END
}
EXPORT int cuDriverGetVersion(int *version) {
  *version = (int)setting("FAKE_CUDA_DRIVER", 12080);
  return 0;
}
EXPORT int cuGetErrorName(int code, const char **text) {
  *text = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_FAKE";
  return 0;
}
EXPORT int cuGetErrorString(int code, const char **text) {
  *text = code == 2 ? "out of memory" : code == 700 ? "an illegal memory access was encountered" : "a fake error";
  return 0;
}
EXPORT int cuDeviceGetCount(int *count) { CALL(cuDeviceGetCount, STARTED) *count = (int)setting("FAKE_CUDA_DEVICES", 1); END }
EXPORT int cuDeviceGet(int *device, int ordinal) { CALL(cuDeviceGet, STARTED) *device = 40 + ordinal; END }
EXPORT int cuDeviceGetName(char *name, int size, int device) {
  CALL(cuDeviceGetName, STARTED)
  snprintf(name, (size_t)size, "Fake GPU %d", device - 40);
  END
}
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  CALL(cuDeviceGetAttribute, STARTED)
  *value = fake_capability(attribute == 75);
  END
}
int fake_capability(int major) {
  const char *text = getenv("FAKE_CUDA_CAPABILITY");
  int first = 9, second = 0;
  if (text != NULL) sscanf(text, "%d.%d", &first, &second);
  return major ? first : second;
}
EXPORT int cuDevicePrimaryCtxRetain(void **context, int device) {
  CALL(cuDevicePrimaryCtxRetain, STARTED)
  retained++;
  *context = (void *)(uintptr_t)(0x1000 + device);
  END
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
  (void)device;
  CALL(cuDevicePrimaryCtxRelease_v2, STARTED)
  if (--retained < 0) code = INVALID_CONTEXT;
  END
}
EXPORT int cuCtxPushCurrent_v2(void *context) { CALL(cuCtxPushCurrent_v2, STARTED) contexts[depth++] = context; END }
EXPORT int cuCtxPopCurrent_v2(void **context) { CALL(cuCtxPopCurrent_v2, STARTED) *context = contexts[--depth]; END }
EXPORT int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  CALL(cuMemGetInfo_v2, CONTEXT)
  *total = 2ull << 30;
  *free_bytes = setting("FAKE_CUDA_FREE", 1ull << 30) - taken;
  END
}
EXPORT int cuMemAlloc_v2(uint64_t *address, size_t size) {
  CALL(cuMemAlloc_v2, CONTEXT | NOT_IN_CAPTURE)
  if (size == 0) code = INVALID_VALUE;
  else if (taken + size > setting("FAKE_CUDA_FREE", 1ull << 30)) code = OUT_OF_MEMORY;
  else {
    size_t whole = (size + 255) / 256 * 256;
    *address = keep(DEVICE, memset(aligned_alloc(256, whole), 0xff, whole), size); /* f32: NaN; i32: -1 */
    taken += size;
    entries[entry_count - 1].destination = *address;
    entries[entry_count - 1].bytes = size;
  }
  END
}
EXPORT int cuMemFree_v2(uint64_t address) { CALL(cuMemFree_v2, CONTEXT) flush(queued); code = drop(DEVICE, address); END }
EXPORT int cuMemAllocHost_v2(void **address, size_t size) {
  CALL(cuMemAllocHost_v2, CONTEXT | NOT_IN_CAPTURE)
  *address = (void *)(uintptr_t)keep(HOST, memset(malloc(size), 0xff, size), size);
  END
}
EXPORT int cuMemFreeHost(void *address) {
  CALL(cuMemFreeHost, CONTEXT)
  flush(queued);
  code = drop(HOST, (uint64_t)(uintptr_t)address);
  END
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
  return copy("cuMemcpyHtoDAsync_v2", to, 1, (uint64_t)(uintptr_t)from, 0, bytes, stream);
}
EXPORT int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
  return copy("cuMemcpyDtoHAsync_v2", (uint64_t)(uintptr_t)to, 0, from, 1, bytes, stream);
}
EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
  return copy("cuMemcpyDtoDAsync_v2", to, 1, from, 1, bytes, stream);
}
EXPORT int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void *stream) {
  CALL(cuMemsetD8Async, CONTEXT)
  if (value != 0 || !inside(DEVICE, to, bytes)) code = INVALID_VALUE;
  else start((Node){.entry = {.destination = to, .bytes = bytes}, .fill = 1}, stream);
  END
}
EXPORT int cuModuleLoadData(void **module, const void *image) {
  CALL(cuModuleLoadData, CONTEXT)
  Function *function = calloc(1, sizeof *function);
  code = fake_module(image, function);
  if (code) free(function);
  else *module = (void *)(uintptr_t)keep(MODULE, function, sizeof *function);
  END
}
EXPORT int cuModuleUnload(void *module) { CALL(cuModuleUnload, CONTEXT) code = drop(MODULE, (uint64_t)(uintptr_t)module); END }
EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
  CALL(cuModuleGetFunction, CONTEXT)
  if (strcmp(((Function *)module)->name, name) != 0) code = NOT_FOUND;
  else *function = module;
  END
}
EXPORT int cuFuncSetAttribute(void *function, int attribute, int value) {
  CALL(cuFuncSetAttribute, CONTEXT)
  if (attribute != 8) code = INVALID_VALUE;
  else ((Function *)function)->shared = (uint32_t)value;
  END
}
#ifndef OLD_DRIVER
EXPORT int cuLaunchKernelEx(const Config *config, void *handle, void **parameters, void **extra) {
  Function *function = handle;
  CALL(cuLaunchKernelEx, CONTEXT)
  if (extra != NULL || config->attribute_count > 1 || config->block[0] > 1024 || config->grid[0] == 0 ||
      config->shared > function->shared) {
    code = INVALID_VALUE;
    goto out;
  }
  Node node = {.function = function, .entry = {.shared = config->shared, .arguments = function->parameters}};
  snprintf(node.entry.name, sizeof node.entry.name, "%s", function->name);
  for (int i = 0; i < 3; i++) node.entry.grid[i] = config->grid[i], node.entry.block[i] = config->block[i];
  if (config->attribute_count == 1) {
    if (config->attributes[0].id != 6) code = INVALID_VALUE;
    node.entry.dependent = config->attributes[0].value.allowed;
  }
  for (int i = 0; i < function->parameters; i++) {
    node.entry.values[i] = *(uint64_t *)parameters[i];
    int hidden = i >= function->parameters - 2;
    if (hidden ? node.entry.values[i] != 0 : !inside(DEVICE, node.entry.values[i], 1)) code = sticky = ILLEGAL_ADDRESS;
  }
  if (code == 0) start(node, config->stream);
  END
}
#endif
EXPORT int cuStreamCreate(void **stream, unsigned flags) {
  (void)flags;
  CALL(cuStreamCreate, CONTEXT)
  *stream = (void *)(uintptr_t)keep(OTHER, malloc(8), 8);
  END
}
EXPORT int cuStreamDestroy_v2(void *stream) { CALL(cuStreamDestroy_v2, CONTEXT) code = drop(OTHER, (uint64_t)(uintptr_t)stream); END }
EXPORT int cuStreamSynchronize(void *stream) {
  (void)stream;
  CALL(cuStreamSynchronize, CONTEXT | NOT_IN_CAPTURE)
  flush(queued);
  code = sticky;
  END
}
EXPORT int cuStreamBeginCapture_v2(void *stream, int mode) {
  CALL(cuStreamBeginCapture_v2, CONTEXT | NOT_IN_CAPTURE)
  if (stream == NULL || mode != 1) code = CAPTURE_UNSUPPORTED;
  else {
    capturing = calloc(1, sizeof *capturing);
    capturing->stream = stream;
  }
  END
}
EXPORT int cuStreamEndCapture(void *stream, void **graph) {
  (void)stream;
  CALL(cuStreamEndCapture, CONTEXT)
  *graph = (void *)(uintptr_t)keep(OTHER, capturing, sizeof *capturing);
  capturing = NULL;
  END
}
EXPORT int cuGraphInstantiateWithFlags(void **instance, void *graph, unsigned long long flags) {
  (void)flags;
  CALL(cuGraphInstantiateWithFlags, CONTEXT)
  *instance = memcpy(malloc(sizeof(Graph)), graph, sizeof(Graph));
  keep(OTHER, *instance, sizeof(Graph));
  END
}
EXPORT int cuGraphDestroy(void *graph) { CALL(cuGraphDestroy, CONTEXT) code = drop(OTHER, (uint64_t)(uintptr_t)graph); END }
EXPORT int cuGraphExecDestroy(void *graph) { CALL(cuGraphExecDestroy, CONTEXT) code = drop(OTHER, (uint64_t)(uintptr_t)graph); END }
EXPORT int cuGraphLaunch(void *graph, void *stream) {
  CALL(cuGraphLaunch, CONTEXT)
  start((Node){.graph = graph}, stream);
  END
}
EXPORT int cuEventCreate(void **event, unsigned flags) {
  (void)flags;
  CALL(cuEventCreate, CONTEXT)
  *event = (void *)(uintptr_t)keep(OTHER, calloc(2, 8), 16);
  END
}
EXPORT int cuEventDestroy_v2(void *event) { CALL(cuEventDestroy_v2, CONTEXT) code = drop(OTHER, (uint64_t)(uintptr_t)event); END }
EXPORT int cuEventRecord(void *event, void *stream) {
  (void)stream;
  CALL(cuEventRecord, CONTEXT)
  ((uint64_t *)event)[0] = (uint64_t)queued;
  ((uint64_t *)event)[1] = now + 2000 * (uint64_t)fake_launches(queue, done, queued);
  END
}
EXPORT int cuEventSynchronize(void *event) {
  CALL(cuEventSynchronize, CONTEXT | NOT_IN_CAPTURE)
  flush((int)((uint64_t *)event)[0]);
  END
}
EXPORT int cuEventElapsedTime(float *milliseconds, void *first, void *last) {
  CALL(cuEventElapsedTime, CONTEXT)
  *milliseconds = (float)(((uint64_t *)last)[1] - ((uint64_t *)first)[1]) / 1e6f;
  END
}

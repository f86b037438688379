/* The null device: a CUDA GPU that accepts everything, checks what a CUDA graph capture forbids, and computes nothing.

   Compiled to `libcuda.so.1` it is the driver; preloaded (LD_PRELOAD) it also stands before NVIDIA's `libcudart`, so
   that torch, Inductor and Triton see one H100 where there is none. build.py compiles it, with nothing but `cc`: each
   function and structure of CUDA that it needs is declared here (binary interface of CUDA 13 on x86_64 Linux).

   What is real: device memory (host memory that pretends), the copies into it, the account of streams, events,
   captures and graphs, the rules of stream capture, the loading of compiled modules, and the log of every call that
   matters.
   What is not: no kernel runs. Whatever is read back from the device is therefore zero bytes, which nobody takes for a
   NaN. A captured copy is counted but not made.

   What this proves: that code compiles for sm_90, is captured, is replayed, launches these kernels in this order and
   never waits for the host. What it cannot prove: values, times, races between streams, what cuDNN or cuBLAS do
   (nullops.py stands in for them).

   The log has one line per call: kind, thread, capture (0: none), name, detail, separated by tabs.

     kernel memcpy memset library    work put on a stream; it belongs to the capture of that column, if that is not 0
     pageable                        the same: a copy between device and ordinary host memory, for which the real
                                     driver may make the host wait
     begin end replay                of a capture; a replay's detail is the capture that it repeats, and the detail of a
                                     begin and the name of a replay are the number of the stream
     sync                            the host waited, or asked how far the device was
     violation                       refused: a capture forbids it
     malloc free module mark         memory, a loaded module, a note of the program's own (nullgpu_mark)  */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* ========================================================================================== what CUDA's headers say */

typedef int Status; /* cudaError_t and CUresult share the numbers used here */
enum {
  SUCCESS = 0,
  OUT_OF_MEMORY = 2,
  NOT_SUPPORTED = 801,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURE_UNMATCHED = 903,
  CAPTURE_UNJOINED = 904,
  CAPTURE_ISOLATION = 905,
  CAPTURED_EVENT = 907,
  CAPTURE_WRONG_THREAD = 908,
};
enum { MODE_GLOBAL, MODE_THREAD_LOCAL, MODE_RELAXED };
enum { CAPTURE_NONE, CAPTURE_ACTIVE, CAPTURE_INVALID };
enum { HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, BY_ADDRESS };
enum { MEMORY_UNREGISTERED, MEMORY_HOST, MEMORY_DEVICE };

typedef struct { unsigned x, y, z; } Dim3;
typedef struct { int type, device; void *device_pointer, *host_pointer; long reserved[8]; } PointerAttributes;
typedef struct {
  size_t shared_bytes, const_bytes, local_bytes;
  int max_threads, registers, ptx_version, binary_version, cache_mode, max_dynamic_shared_bytes, rest[24];
} FunctionAttributes;
typedef struct { Dim3 grid, block; size_t shared_bytes; void *stream, *attributes; unsigned count; } RuntimeLaunch;
typedef struct { unsigned grid[3], block[3], shared_bytes; void *stream, *attributes; unsigned count; } DriverLaunch;

_Static_assert(sizeof(PointerAttributes) == 88, "cudaPointerAttributes");
_Static_assert(sizeof(FunctionAttributes) == 144, "cudaFuncAttributes");
_Static_assert(sizeof(RuntimeLaunch) == 56, "cudaLaunchConfig_t");
_Static_assert(sizeof(DriverLaunch) == 56, "CUlaunchConfig");

/* ========================================================================================================== the log */

typedef struct Capture Capture;
typedef struct Stream { Capture *capture; long number, work, joined; struct Stream *next; } Stream;

/* One lock for everything: the device has no speed to lose, and autograd and the loaders call from other threads. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *log_file;
static __thread Status last_error;

static int thread(void) { return (int)syscall(SYS_gettid); }

static void write_line(const char *kind, long capture, const char *name, const char *detail) {
  if (log_file) fprintf(log_file, "%s\t%d\t%ld\t%s\t%s\n", kind, thread(), capture, name, detail);
}

/* Start a log in a new file; NULL ends logging. Lines leave the process one by one, so that a crash loses none. */
EXPORT void nullgpu_open(const char *path) {
  pthread_mutex_lock(&lock);
  if (log_file) fclose(log_file);
  log_file = path ? fopen(path, "w") : NULL;
  if (log_file) setvbuf(log_file, NULL, _IOLBF, 0);
  pthread_mutex_unlock(&lock);
}

EXPORT void nullgpu_mark(const char *name, const char *detail) {
  pthread_mutex_lock(&lock);
  write_line("mark", 0, name, detail);
  pthread_mutex_unlock(&lock);
}

static Status failed(Status status) {
  last_error = status;
  return status;
}

/* ================================================================================================ the rules of capture

   As the documentation of cudaStreamBeginCapture and cudaThreadExchangeStreamCaptureMode states them. A call that may
   touch other work (allocating, waiting, loading a module) is unsafe. It is refused, and spoils the capture, while its
   own thread captures in a mode other than "relaxed", or while any thread captures in mode "global", unless the calling
   thread has declared itself relaxed. A stream that waits for an event of a captured stream joins the capture, and must
   be waited for before the capture ends. */

struct Capture { long id; int mode, thread, invalid; Stream *origin; long nodes; Capture *next; };
typedef struct { long id, nodes; } Graph;
typedef struct { Capture *capture; long capture_id; Stream *stream; long work; struct timespec time; } Event;

static Capture *captures; /* those under way */
static Stream *streams;
static long capture_ids;
static Stream legacy; /* the default stream: never captured */
static __thread int thread_mode;

static Stream *stream_of(void *handle) { return (uintptr_t)handle <= 2 ? &legacy : handle; }

static long capture_id(Stream *stream) { return stream->capture ? stream->capture->id : 0; }

/* Refuse an unsafe call where a capture forbids it. The caller holds the lock. */
static Status unsafe_locked(const char *name) {
  for (Capture *each = captures; each; each = each->next) {
    int own = each->thread == thread();
    if (each->mode == MODE_RELAXED || thread_mode == MODE_RELAXED) continue;
    if (own || (each->mode == MODE_GLOBAL && thread_mode == MODE_GLOBAL)) {
      write_line("violation", each->id, name, "while a stream is captured");
      each->invalid = 1;
      return failed(CAPTURE_UNSUPPORTED);
    }
  }
  return SUCCESS;
}

static Status unsafe(const char *name) {
  pthread_mutex_lock(&lock);
  Status status = unsafe_locked(name);
  pthread_mutex_unlock(&lock);
  return status;
}

/* The host waits for the device, or asks how far it is: unsafe anywhere in a capture, forbidden on a captured stream. */
static Status host_waits(const char *name, Stream *stream) {
  pthread_mutex_lock(&lock);
  Status status = SUCCESS;
  if (stream && stream->capture) {
    write_line("violation", stream->capture->id, name, "on a captured stream");
    stream->capture->invalid = 1;
    status = failed(CAPTURE_UNSUPPORTED);
  } else {
    status = unsafe_locked(name);
  }
  if (status == SUCCESS) write_line("sync", 0, name, "");
  pthread_mutex_unlock(&lock);
  return status;
}

/* Put one piece of work on a stream: a node of its capture, if it is captured. */
static Status enqueue(const char *kind, void *handle, const char *name, const char *detail) {
  pthread_mutex_lock(&lock);
  Stream *stream = stream_of(handle);
  Status status = stream->capture && stream->capture->invalid ? failed(CAPTURE_INVALIDATED) : SUCCESS;
  if (status == SUCCESS) {
    write_line(kind, capture_id(stream), name, detail);
    stream->work++;
    if (stream->capture) stream->capture->nodes++;
  }
  pthread_mutex_unlock(&lock);
  return status;
}

/* A call of a library that nullops.py stands in for; such a call is one or more kernels of its own on a real GPU. */
EXPORT Status nullgpu_library(const char *name, void *stream, const char *detail) {
  return enqueue("library", stream, name, detail);
}

/* =========================================================================================================== memory */

typedef struct Block { char *start; size_t bytes; int type; struct Block *next; } Block;
static Block *blocks;
static size_t used_bytes;

/* 80 GiB, or NULLGPU_MEMORY_BYTES: a small number shows what running out of memory does. */
static size_t capacity(void) {
  const char *given = getenv("NULLGPU_MEMORY_BYTES");
  return given ? strtoull(given, NULL, 10) : (size_t)80 << 30;
}

static int memory_type(const void *pointer) {
  for (Block *each = blocks; each; each = each->next)
    if ((char *)pointer >= each->start && (char *)pointer < each->start + each->bytes) return each->type;
  return MEMORY_UNREGISTERED;
}

static void remember(void *start, size_t bytes, int type) {
  Block *block = malloc(sizeof *block);
  *block = (Block){start, bytes, type, blocks};
  blocks = block;
}

/* Pages that are never touched cost nothing, so that a model's activations take no memory. */
static Status allocate(void **pointer, size_t bytes, int type, const char *name) {
  char detail[32];
  snprintf(detail, sizeof detail, "%zu", bytes);
  pthread_mutex_lock(&lock);
  Status status = unsafe_locked(name);
  if (status == SUCCESS && type == MEMORY_DEVICE && used_bytes + bytes > capacity()) status = failed(OUT_OF_MEMORY);
  if (status == SUCCESS) {
    size_t size = bytes ? bytes : 1;
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    status = start == MAP_FAILED ? failed(OUT_OF_MEMORY) : SUCCESS;
    if (status == SUCCESS) {
      *pointer = start;
      remember(start, size, type);
      if (type == MEMORY_DEVICE) used_bytes += size;
      write_line("malloc", 0, name, detail);
    }
  }
  pthread_mutex_unlock(&lock);
  return status;
}

static Status release(void *pointer, const char *name) {
  pthread_mutex_lock(&lock);
  Status status = pointer ? unsafe_locked(name) : SUCCESS;
  for (Block **link = &blocks; status == SUCCESS && pointer && *link; link = &(*link)->next) {
    Block *block = *link;
    if (block->start != pointer) continue;
    if (block->type == MEMORY_DEVICE) used_bytes -= block->bytes;
    munmap(block->start, block->bytes);
    write_line("free", 0, name, "");
    *link = block->next;
    free(block);
    break;
  }
  pthread_mutex_unlock(&lock);
  return status;
}

EXPORT Status cudaMalloc(void **pointer, size_t bytes) { return allocate(pointer, bytes, MEMORY_DEVICE, "cudaMalloc"); }
EXPORT Status cudaFree(void *pointer) { return release(pointer, "cudaFree"); }
EXPORT Status cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  return allocate(pointer, bytes, MEMORY_HOST, "cudaHostAlloc");
}
EXPORT Status cudaFreeHost(void *pointer) { return release(pointer, "cudaFreeHost"); }
EXPORT Status cudaHostRegister(void *pointer, size_t bytes, unsigned flags) {
  pthread_mutex_lock(&lock);
  Status status = unsafe_locked("cudaHostRegister");
  if (status == SUCCESS) remember(pointer, bytes, MEMORY_HOST);
  pthread_mutex_unlock(&lock);
  return status;
}
EXPORT Status cudaHostUnregister(void *pointer) {
  pthread_mutex_lock(&lock);
  for (Block **link = &blocks; *link; link = &(*link)->next)
    if ((*link)->start == pointer) { *link = (*link)->next; break; }
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}
EXPORT Status cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  *total_bytes = capacity();
  *free_bytes = *total_bytes - used_bytes;
  return SUCCESS;
}
EXPORT Status cudaPointerGetAttributes(PointerAttributes *attributes, const void *pointer) {
  pthread_mutex_lock(&lock);
  int type = memory_type(pointer);
  pthread_mutex_unlock(&lock);
  *attributes = (PointerAttributes){.type = type, .device_pointer = (void *)pointer, .host_pointer = (void *)pointer};
  return SUCCESS;
}

/* What a copy does at once. Nothing was computed, so what comes back from the device is zero. */
static void copy(void *target, const void *source, size_t bytes, int direction) {
  if (direction == DEVICE_TO_HOST) memset(target, 0, bytes);
  else memcpy(target, source, bytes);
}

static int direction_of(const void *target, const void *source, int direction) {
  if (direction != BY_ADDRESS) return direction;
  int to = memory_type(target) == MEMORY_DEVICE, from = memory_type(source) == MEMORY_DEVICE;
  return from ? (to ? DEVICE_TO_DEVICE : DEVICE_TO_HOST) : (to ? HOST_TO_DEVICE : HOST_TO_HOST);
}

static const char *const DIRECTIONS[] = {"host to host", "host to device", "device to host", "device to device"};

EXPORT Status cudaMemcpyAsync(void *target, const void *source, size_t bytes, int direction, void *handle) {
  char detail[32];
  snprintf(detail, sizeof detail, "%zu", bytes);
  pthread_mutex_lock(&lock);
  direction = direction_of(target, source, direction);
  int crosses = direction == HOST_TO_DEVICE || direction == DEVICE_TO_HOST;
  const void *host = direction == HOST_TO_DEVICE ? source : target;
  int pageable = crosses && memory_type(host) == MEMORY_UNREGISTERED;
  int captured = stream_of(handle)->capture != NULL;
  pthread_mutex_unlock(&lock);
  Status status = enqueue(pageable ? "pageable" : "memcpy", handle, DIRECTIONS[direction], detail);
  if (status == SUCCESS && !captured) copy(target, source, bytes, direction);
  return status;
}
EXPORT Status cudaMemcpyPeerAsync(void *target, int to, const void *source, int from, size_t bytes, void *stream) {
  return cudaMemcpyAsync(target, source, bytes, DEVICE_TO_DEVICE, stream);
}
EXPORT Status cudaMemcpy(void *target, const void *source, size_t bytes, int direction) {
  Status status = host_waits("cudaMemcpy", NULL);
  return status ? status : cudaMemcpyAsync(target, source, bytes, direction, NULL);
}
EXPORT Status cudaMemsetAsync(void *target, int value, size_t bytes, void *handle) {
  char detail[32];
  snprintf(detail, sizeof detail, "%zu", bytes);
  int captured = stream_of(handle)->capture != NULL;
  Status status = enqueue("memset", handle, "memset", detail);
  if (status == SUCCESS && !captured) memset(target, value, bytes);
  return status;
}
EXPORT Status cudaMemset(void *target, int value, size_t bytes) { return cudaMemsetAsync(target, value, bytes, NULL); }
EXPORT Status cudaMemcpyToSymbol(const void *s, const void *from, size_t n, size_t at, int direction) { return SUCCESS; }
EXPORT Status cudaGetSymbolAddress(void **pointer, const void *symbol) { return cudaMalloc(pointer, 4096); }

/* ======================================================================================================= the device */

static const char NAME[] = "NVIDIA H100 80GB HBM3";
#define CUDA_VERSION 13000

/* The attributes that torch and Triton ask for, by their number in cudaDeviceAttr (CUdevice_attribute is the same). */
static const int ATTRIBUTES[][2] = {
    {1, 1024},     {2, 1024},   {3, 1024},  {4, 64},      {5, 2147483647}, {6, 65535},    {7, 65535},   {8, 49152},
    {10, 32},      {12, 65536}, {13, 1980000}, {16, 132}, {36, 2619000},   {37, 5120},    {38, 50 << 20}, {39, 2048},
    {41, 1},       {75, 9},     {76, 0},    {81, 233472}, {82, 65536},     {95, 1},       {97, 232448}, {106, 32},
    {120, 1},
};

static int attribute(int number) {
  for (size_t i = 0; i < sizeof ATTRIBUTES / sizeof *ATTRIBUTES; i++)
    if (ATTRIBUTES[i][0] == number) return ATTRIBUTES[i][1];
  return 0;
}

/* Fields of struct cudaDeviceProp, of which only these are read: byte offset and value. */
static const int PROPERTIES[][2] = {
    {304, 65536}, {308, 32},  {320, 1024},  {324, 1024},    {328, 1024},     {332, 64},   {336, 2147483647}, {340, 65535},
    {344, 65535}, {360, 9},   {364, 0},     {384, 132},     {560, 1},        {584, 3},    {588, 1},          {592, 5120},
    {596, 50 << 20}, {600, 32 << 20}, {604, 2048}, {632, 65536}, {668, 1},   {688, 32},   {748, 1},
};

EXPORT Status cudaGetDeviceProperties(void *properties, int device) {
  char *bytes = memset(properties, 0, 1008);
  strcpy(bytes, NAME);
  for (size_t i = 0; i < sizeof PROPERTIES / sizeof *PROPERTIES; i++)
    memcpy(bytes + PROPERTIES[i][0], &PROPERTIES[i][1], sizeof(int));
  *(size_t *)(bytes + 288) = capacity();
  *(size_t *)(bytes + 296) = 49152;  /* shared memory of a block */
  *(size_t *)(bytes + 352) = 65536;  /* constant memory */
  *(size_t *)(bytes + 624) = 233472; /* shared memory of a multiprocessor */
  *(size_t *)(bytes + 672) = 232448; /* shared memory of a block that asks for it */
  *(size_t *)(bytes + 696) = 1024;   /* reserved of it */
  return SUCCESS;
}
EXPORT Status cudaGetDeviceCount(int *count) { return *count = 1, SUCCESS; }
EXPORT Status cudaGetDevice(int *device) { return *device = 0, SUCCESS; }
EXPORT Status cudaSetDevice(int device) { return SUCCESS; }
EXPORT Status cudaDriverGetVersion(int *version) { return *version = CUDA_VERSION, SUCCESS; }
EXPORT Status cudaRuntimeGetVersion(int *version) { return *version = CUDA_VERSION, SUCCESS; }
EXPORT Status cudaPeekAtLastError(void) { return last_error; }
EXPORT Status cudaGetLastError(void) {
  Status status = last_error;
  last_error = SUCCESS;
  return status;
}
EXPORT Status cudaDeviceGetAttribute(int *value, int number, int device) { return *value = attribute(number), SUCCESS; }
EXPORT Status cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, SUCCESS; }
EXPORT Status cudaDeviceCanAccessPeer(int *can, int from, int to) { return *can = 0, SUCCESS; }
EXPORT Status cudaDeviceGetPCIBusId(char *text, int length, int device) {
  snprintf(text, length, "0000:00:00.0");
  return SUCCESS;
}
EXPORT Status cudaDeviceSynchronize(void) { return host_waits("cudaDeviceSynchronize", NULL); }
EXPORT Status cudaDeviceGetDefaultMemPool(void **pool, int device) { return *pool = (void *)16, SUCCESS; }
EXPORT Status cudaMemPoolGetAttribute(void *pool, int number, void *value) { return memset(value, 0, 8), SUCCESS; }
EXPORT Status cudaMemPoolSetAttribute(void *pool, int number, void *value) { return SUCCESS; }
EXPORT Status cudaProfilerStart(void) { return SUCCESS; }
EXPORT Status cudaProfilerStop(void) { return SUCCESS; }

/* =============================================================================================== streams and events */

EXPORT Status cudaStreamCreateWithPriority(void **handle, unsigned flags, int priority) {
  Stream *stream = calloc(1, sizeof *stream);
  pthread_mutex_lock(&lock);
  stream->number = streams ? streams->number + 1 : 1;
  stream->next = streams;
  streams = stream;
  pthread_mutex_unlock(&lock);
  *handle = stream;
  return SUCCESS;
}
EXPORT Status cudaStreamCreate(void **handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }
EXPORT Status cudaStreamDestroy(void *handle) { return SUCCESS; } /* torch keeps its streams until the end */
EXPORT Status cudaStreamGetPriority(void *handle, int *priority) { return *priority = 0, SUCCESS; }
EXPORT Status cudaStreamSynchronize(void *handle) { return host_waits("cudaStreamSynchronize", stream_of(handle)); }
EXPORT Status cudaStreamQuery(void *handle) { return host_waits("cudaStreamQuery", stream_of(handle)); }

EXPORT Status cudaEventCreateWithFlags(void **handle, unsigned flags) {
  return *handle = calloc(1, sizeof(Event)), SUCCESS;
}
EXPORT Status cudaEventCreate(void **handle) { return cudaEventCreateWithFlags(handle, 0); }
EXPORT Status cudaEventDestroy(void *handle) { return free(handle), SUCCESS; }
EXPORT Status cudaEventRecordWithFlags(void *handle, void *stream_handle, unsigned flags) {
  pthread_mutex_lock(&lock);
  Stream *stream = stream_of(stream_handle);
  Event *event = handle;
  *event = (Event){stream->capture, capture_id(stream), stream, stream->work};
  clock_gettime(CLOCK_MONOTONIC, &event->time);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}
EXPORT Status cudaEventRecord(void *handle, void *stream) { return cudaEventRecordWithFlags(handle, stream, 0); }

/* Whether the capture in which the event was recorded is still under way. */
static int captured(Event *event) {
  for (Capture *each = captures; each; each = each->next)
    if (each == event->capture && each->id == event->capture_id) return 1;
  return 0;
}

EXPORT Status cudaStreamWaitEvent(void *handle, void *event_handle, unsigned flags) {
  pthread_mutex_lock(&lock);
  Stream *stream = stream_of(handle);
  Event *event = event_handle;
  Status status = SUCCESS;
  if (captured(event)) {
    if (!stream->capture) { /* fork: the waiting stream joins the capture, with nothing to be waited for yet */
      stream->capture = event->capture;
      stream->work = stream->joined = 0;
    }
    if (event->stream != stream && event->work > event->stream->joined) event->stream->joined = event->work;
  } else if (stream->capture && event->stream) {
    write_line("violation", stream->capture->id, "cudaStreamWaitEvent", "for work that is not captured");
    stream->capture->invalid = 1;
    status = failed(CAPTURE_ISOLATION);
  }
  pthread_mutex_unlock(&lock);
  return status;
}

/* torch's allocator asks whether an event has passed, often, and never waits for it: this is no "sync". */
EXPORT Status cudaEventQuery(void *handle) {
  pthread_mutex_lock(&lock);
  Status status = unsafe_locked("cudaEventQuery");
  if (status == SUCCESS && captured(handle)) {
    write_line("violation", ((Event *)handle)->capture_id, "cudaEventQuery", "of a captured event");
    status = failed(CAPTURED_EVENT);
  }
  pthread_mutex_unlock(&lock);
  return status;
}
EXPORT Status cudaEventSynchronize(void *handle) { return host_waits("cudaEventSynchronize", NULL); }

/* The host's time between the two records: nothing of the device's, which has none. */
EXPORT Status cudaEventElapsedTime(float *milliseconds, void *first, void *second) {
  struct timespec a = ((Event *)first)->time, b = ((Event *)second)->time;
  *milliseconds = (b.tv_sec - a.tv_sec) * 1e3 + (b.tv_nsec - a.tv_nsec) / 1e6;
  return SUCCESS;
}
EXPORT Status cudaLaunchHostFunc(void *handle, void (*work)(void *), void *data) {
  Status status = enqueue("kernel", handle, "host function", "");
  if (status == SUCCESS && !stream_of(handle)->capture) work(data);
  return status;
}
EXPORT Status cudaStreamAddCallback(void *handle, void (*work)(void *, int, void *), void *data, unsigned flags) {
  Status status = unsafe("cudaStreamAddCallback");
  if (status == SUCCESS) work(handle, SUCCESS, data);
  return status;
}

/* ============================================================================================== captures and graphs */

EXPORT Status cudaThreadExchangeStreamCaptureMode(int *mode) {
  int before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return SUCCESS;
}

EXPORT Status cudaStreamBeginCapture(void *handle, int mode) {
  Stream *stream = stream_of(handle);
  if (stream == &legacy || stream->capture) return failed(CAPTURE_UNSUPPORTED);
  pthread_mutex_lock(&lock);
  Capture *capture = calloc(1, sizeof *capture);
  *capture = (Capture){.id = ++capture_ids, .mode = mode, .thread = thread(), .origin = stream, .next = captures};
  captures = stream->capture = capture;
  stream->work = stream->joined = 0;
  char number[24];
  snprintf(number, sizeof number, "%ld", stream->number);
  write_line("begin", capture->id, "capture", number);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

/* Let go of a capture's streams; return whether one of them, forked from the origin, has not been joined again. */
static int let_go(Capture *capture) {
  int unjoined = 0;
  for (Stream *each = streams; each; each = each->next) {
    if (each->capture != capture) continue;
    if (each != capture->origin && each->work > each->joined) unjoined = 1;
    each->capture = NULL;
  }
  for (Capture **link = &captures; *link; link = &(*link)->next)
    if (*link == capture) { *link = capture->next; break; }
  return unjoined;
}

EXPORT Status cudaStreamEndCapture(void *handle, void **graph_handle) {
  pthread_mutex_lock(&lock);
  Capture *capture = stream_of(handle)->capture;
  Status status = SUCCESS;
  if (!capture || capture->origin != stream_of(handle)) status = CAPTURE_UNMATCHED;
  else if (capture->thread != thread() && capture->mode != MODE_RELAXED) status = CAPTURE_WRONG_THREAD;
  *graph_handle = NULL;
  if (status == SUCCESS) {
    int unjoined = let_go(capture);
    status = capture->invalid ? CAPTURE_INVALIDATED : unjoined ? CAPTURE_UNJOINED : SUCCESS;
    if (unjoined) write_line("violation", capture->id, "cudaStreamEndCapture", "a forked stream was not joined");
    write_line("end", capture->id, "capture", status == SUCCESS ? "whole" : "spoilt");
  }
  if (status == SUCCESS) {
    Graph *graph = malloc(sizeof *graph);
    *graph = (Graph){capture->id, capture->nodes};
    *graph_handle = graph;
  }
  pthread_mutex_unlock(&lock);
  return status ? failed(status) : SUCCESS;
}

static int capture_status(Stream *stream) {
  return !stream->capture ? CAPTURE_NONE : stream->capture->invalid ? CAPTURE_INVALID : CAPTURE_ACTIVE;
}
EXPORT Status cudaStreamIsCapturing(void *handle, int *status) {
  return *status = capture_status(stream_of(handle)), SUCCESS;
}
EXPORT Status cudaStreamGetCaptureInfo(
    void *handle, int *status, unsigned long long *id, void **graph, void *dependencies, void *edges, size_t *count) {
  Stream *stream = stream_of(handle);
  *status = capture_status(stream);
  if (id) *id = capture_id(stream);
  if (graph) *graph = stream->capture; /* torch only looks whether there is one */
  if (dependencies) *(void **)dependencies = NULL;
  if (edges) *(void **)edges = NULL;
  if (count) *count = 0;
  return SUCCESS;
}
EXPORT Status cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  Graph *copied = malloc(sizeof *copied); /* torch destroys the graph and keeps the executable */
  *copied = *(Graph *)graph;
  return *executable = copied, SUCCESS;
}
EXPORT Status cudaGraphLaunch(void *executable, void *handle) {
  char id[24], stream[24];
  snprintf(id, sizeof id, "%ld", ((Graph *)executable)->id);
  snprintf(stream, sizeof stream, "%ld", stream_of(handle)->number);
  return enqueue("replay", handle, stream, id);
}
EXPORT Status cudaGraphDestroy(void *graph) { return free(graph), SUCCESS; }
EXPORT Status cudaGraphExecDestroy(void *executable) { return free(executable), SUCCESS; }
EXPORT Status cudaGraphGetNodes(void *graph, void **nodes, size_t *count) {
  return *count = (size_t)((Graph *)graph)->nodes, SUCCESS;
}

/* ======================================================================================= kernels of the runtime (ATen)

   Compiled CUDA code registers its kernels when its library is loaded: the address of a host function and the kernel's
   mangled name. A launch names the host function. */

typedef struct Kernel { const void *host; char *name; struct Kernel *next; } Kernel;
#define BUCKETS 8192
static Kernel *kernels[BUCKETS];

static Kernel **bucket(const void *host) { return &kernels[((uintptr_t)host >> 4) % BUCKETS]; }

static const char *kernel_name(const void *host) {
  for (Kernel *each = *bucket(host); each; each = each->next)
    if (each->host == host) return each->name;
  return "unknown kernel";
}

static Status launch(const char *name, Dim3 grid, Dim3 block, void *stream) {
  char detail[96];
  snprintf(detail, sizeof detail, "grid %u,%u,%u block %u,%u,%u", grid.x, grid.y, grid.z, block.x, block.y, block.z);
  return enqueue("kernel", stream, name, detail);
}

EXPORT void __cudaRegisterFunction(
    void **handle, const char *host, char *device, const char *name, int limit, void *a, void *b, void *c, void *d, int *e) {
  Kernel *kernel = malloc(sizeof *kernel);
  *kernel = (Kernel){host, strdup(name), *bucket(host)};
  *bucket(host) = kernel;
}
EXPORT void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[2];
  return handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **handle) {}
EXPORT void __cudaUnregisterFatBinary(void **handle) {}
EXPORT void __cudaRegisterVar(void **h, char *v, char *a, const char *name, int e, size_t bytes, int c, int g) {}

/* `kernel<<<grid, block, shared, stream>>>()` pushes its configuration, and the stub that it calls pops it. */
static __thread struct { Dim3 grid, block; size_t shared_bytes; void *stream; } pushed;
EXPORT unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared_bytes, void *stream) {
  pushed.grid = grid, pushed.block = block, pushed.shared_bytes = shared_bytes, pushed.stream = stream;
  return 0;
}
EXPORT Status __cudaPopCallConfiguration(Dim3 *grid, Dim3 *block, size_t *shared_bytes, void *stream) {
  *grid = pushed.grid, *block = pushed.block, *shared_bytes = pushed.shared_bytes;
  *(void **)stream = pushed.stream;
  return SUCCESS;
}
EXPORT Status __cudaGetKernel(const void **kernel, const void *host) { return *kernel = host, SUCCESS; }
EXPORT Status cudaLaunchKernel(const void *host, Dim3 grid, Dim3 block, void **arguments, size_t shared, void *stream) {
  return launch(kernel_name(host), grid, block, stream);
}
EXPORT Status __cudaLaunchKernel(const void *host, Dim3 grid, Dim3 block, void **arguments, size_t shared, void *stream) {
  return launch(kernel_name(host), grid, block, stream);
}
EXPORT Status cudaLaunchKernelExC(const RuntimeLaunch *config, const void *host, void **arguments) {
  return launch(kernel_name(host), config->grid, config->block, config->stream);
}
EXPORT Status cudaFuncGetAttributes(FunctionAttributes *attributes, const void *host) {
  *attributes = (FunctionAttributes){.max_threads = 1024, .registers = 32, .ptx_version = 90, .binary_version = 90};
  return SUCCESS;
}
EXPORT Status cudaFuncSetAttribute(const void *host, int number, int value) { return SUCCESS; }
EXPORT Status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *count, const void *host, int threads, size_t shared_bytes, unsigned flags) {
  return *count = 2, SUCCESS;
}

/* ======================================================================================== the driver (Triton's way) */

EXPORT Status cuInit(unsigned flags) { return SUCCESS; }
EXPORT Status cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, SUCCESS; }
EXPORT Status cuDeviceGet(int *device, int number) { return *device = 0, SUCCESS; }
EXPORT Status cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
EXPORT Status cuDeviceGetAttribute(int *value, int number, int device) { return *value = attribute(number), SUCCESS; }
EXPORT Status cuDeviceGetName(char *text, int length, int device) { return snprintf(text, length, NAME), SUCCESS; }
EXPORT Status cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  return *flags = 0, *active = 1, SUCCESS;
}
EXPORT Status cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)32, SUCCESS; }
EXPORT Status cuCtxGetCurrent(void **context) { return *context = (void *)32, SUCCESS; }
EXPORT Status cuCtxSetCurrent(void *context) { return SUCCESS; }
EXPORT Status cuCtxGetDevice(int *device) { return *device = 0, SUCCESS; }
EXPORT Status cuCtxGetLimit(size_t *value, int limit) { return *value = 0, SUCCESS; }
EXPORT Status cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
EXPORT Status cuGetErrorString(Status status, const char **text) { return *text = "the null device", SUCCESS; }
EXPORT Status cuGetErrorName(Status status, const char **text) { return *text = "the null device", SUCCESS; }

/* A compiled module is kept as a file (in the folder NULLGPU_MODULES), where its registers and spills can be read. Its
   size is where its section headers end, for that is how an ELF file of this kind is laid out. */
static Status keep_module(const unsigned char *image) {
  Status status = unsafe("cuModuleLoad");
  const char *folder = getenv("NULLGPU_MODULES");
  if (status != SUCCESS || !folder || memcmp(image, "\177ELF", 4)) return status;
  size_t bytes = *(uint64_t *)(image + 40) + (size_t) * (uint16_t *)(image + 58) * *(uint16_t *)(image + 60);
  size_t segments = *(uint64_t *)(image + 32) + (size_t) * (uint16_t *)(image + 54) * *(uint16_t *)(image + 56);
  if (segments > bytes) bytes = segments;
  uint64_t hash = 14695981039346656037u; /* FNV-1a: one file for each content */
  for (size_t i = 0; i < bytes; i++) hash = (hash ^ image[i]) * 1099511628211u;
  char path[4096];
  snprintf(path, sizeof path, "%s/%016llx.cubin", folder, (unsigned long long)hash);
  pthread_mutex_lock(&lock);
  write_line("module", 0, strrchr(path, '/') + 1, "");
  FILE *file = access(path, F_OK) ? fopen(path, "w") : NULL;
  if (file) {
    fwrite(image, 1, bytes, file);
    fclose(file);
  }
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

EXPORT Status cuModuleLoadData(void **module, const void *image) { return *module = (void *)48, keep_module(image); }
EXPORT Status cuModuleLoadDataEx(void **module, const void *image, unsigned n, void *options, void **values) {
  return cuModuleLoadData(module, image);
}
EXPORT Status cuModuleLoad(void **module, const char *path) {
  FILE *file = fopen(path, "r");
  if (!file) return 301; /* file not found */
  fseek(file, 0, SEEK_END);
  size_t bytes = (size_t)ftell(file);
  void *image = calloc(1, bytes + 64);
  rewind(file);
  size_t got = fread(image, 1, bytes, file);
  fclose(file);
  Status status = got == bytes ? cuModuleLoadData(module, image) : 301;
  free(image);
  return status;
}
EXPORT Status cuModuleUnload(void *module) { return SUCCESS; }
EXPORT Status cuModuleGetFunction(void **function, void *module, const char *name) {
  return *function = strdup(name), SUCCESS; /* a driver function is its name */
}

enum { FUNCTION_MAX_THREADS = 0, FUNCTION_REGISTERS = 4, FUNCTION_BINARY_VERSION = 6 };
EXPORT Status cuFuncGetAttribute(int *value, int number, void *function) {
  switch (number) {
    case FUNCTION_MAX_THREADS: return *value = 1024, SUCCESS;
    case FUNCTION_REGISTERS: return *value = 32, SUCCESS;
    case FUNCTION_BINARY_VERSION: return *value = 90, SUCCESS;
    default: return *value = 0, SUCCESS;
  }
}
EXPORT Status cuFuncSetAttribute(void *function, int number, int value) { return SUCCESS; }
EXPORT Status cuFuncSetCacheConfig(void *function, int config) { return SUCCESS; }

EXPORT Status cuLaunchKernel(
    void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared_bytes,
    void *stream, void **parameters, void **extra) {
  return launch(function, (Dim3){gx, gy, gz}, (Dim3){bx, by, bz}, stream);
}
EXPORT Status cuLaunchCooperativeKernel(
    void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared_bytes,
    void *stream, void **parameters) {
  return launch(function, (Dim3){gx, gy, gz}, (Dim3){bx, by, bz}, stream);
}
EXPORT Status cuLaunchKernelEx(const DriverLaunch *config, void *function, void **parameters, void **extra) {
  const unsigned *g = config->grid, *b = config->block;
  return launch(function, (Dim3){g[0], g[1], g[2]}, (Dim3){b[0], b[1], b[2]}, config->stream);
}
EXPORT Status cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, void *function, int threads, size_t shared_bytes) {
  return *count = 2, SUCCESS;
}
EXPORT Status cuOccupancyMaxActiveClusters(int *count, void *function, const DriverLaunch *config) {
  return *count = 1, SUCCESS;
}
EXPORT Status cuPointerGetAttribute(void *value, int number, uint64_t pointer) {
  if (number == 3) *(uint64_t *)value = pointer; /* the device's own address */
  else memset(value, 0, 4);
  return SUCCESS;
}

/* Linked against, never called here. */
static Status unsupported(void) { return NOT_SUPPORTED; }
EXPORT Status cuLinkCreate_v2(unsigned n, void *options, void **values, void **state) { return NOT_SUPPORTED; }
EXPORT Status cuLinkAddData_v2(
    void *state, int type, void *data, size_t bytes, const char *name, unsigned n, void *options, void **values) {
  return NOT_SUPPORTED;
}
EXPORT Status cuLinkComplete(void *state, void **cubin, size_t *bytes) { return NOT_SUPPORTED; }
EXPORT Status cuTensorMapEncodeTiled(
    void *map, int type, unsigned rank, void *address, const void *dims, const void *strides, const void *box,
    const void *steps, int interleave, int swizzle, int promotion, int fill) {
  return SUCCESS;
}

/* torch looks up the driver's functions by name; what is not here answers that it is not supported. */
EXPORT Status cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags, int *found) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = (void *)unsupported;
  if (found) *found = 0;
  return SUCCESS;
}

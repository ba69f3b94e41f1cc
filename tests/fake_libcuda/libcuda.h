/* What the two halves of the fake libcuda.so.1 share. */
#include <stddef.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, ILLEGAL_STATE = 401 };
enum { OPERATING_SYSTEM = 304 };
enum { RUNNING = 0, LOCKED = 1, CHECKPOINTED = 2, FAILED = 3, CHECKPOINTING = 4, RESTORING = 5 };

/* Not of the library's own interface: the fake's names must not meet those of the process. */
#pragma GCC visibility push(hidden)
extern int initialised;
void path_of(char *out, const char *format, ...);
int read_line(const char *path, char *out, size_t size);
int get_state(int pid);
void set_state(int pid, int state);
int fault(const char *call, int pid, int *code);
int has_mode(int pid, const char *wanted);
#pragma GCC visibility pop

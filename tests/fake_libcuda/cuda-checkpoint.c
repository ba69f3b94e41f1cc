/* A fake `cuda-checkpoint` (driver 570's options) on the fake library beside it (libcuda.c). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void *library;

static void *find(const char *name)
{
	void *symbol = dlsym(library, name);

	if (!symbol) abort();
	return symbol;
}

static int complain(int code)
{
	int (*words)(int, const char **) = find("cuGetErrorString");
	const char *text = NULL;

	words(code, &text);
	fprintf(stderr, "Error on CUDA checkpoint operation: \"%s\"\n", text ? text : "unknown");
	return code % 256 ? code % 256 : 1;
}

static int act(const char *action, int pid)
{
	static const char *const calls[][2] = {
		{ "lock", "cuCheckpointProcessLock" },
		{ "checkpoint", "cuCheckpointProcessCheckpoint" },
		{ "restore", "cuCheckpointProcessRestore" },
		{ "unlock", "cuCheckpointProcessUnlock" },
	};

	for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
		if (!strcmp(calls[i][0], action)) {
			int (*call)(int, void *) = find(calls[i][1]);

			return call(pid, NULL);
		}
	abort();
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "pid", 1, NULL, 'p' },	 { "action", 1, NULL, 'a' },
		{ "timeout", 1, NULL, 't' },	 { "get-state", 0, NULL, 's' },
		{ "get-restore-tid", 0, NULL, 'r' }, { NULL, 0, NULL, 0 },
	};
	static const char *const states[] = { "running",	"locked", "checkpointed",
					"failed",	"checkpointing", "restoring" };
	const char *action = NULL, *timeout = NULL;
	char path[PATH_MAX];
	int option, pid = 0, ask = 0, code, value = -1;
	int (*init)(unsigned), (*get)(int, int *);
	ssize_t size;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
		switch (option) {
		case 'p': pid = atoi(optarg); break;
		case 'a': action = optarg; break;
		case 't': timeout = optarg; break;
		case 's': case 'r': ask = option; break;
		default: return 1;
		}
	if (timeout && (!action || strcmp(action, "lock"))) return 1;
	size = readlink("/proc/self/exe", path, sizeof path - 1);
	if (size < 0) abort();
	path[size] = 0;
	strcpy(strrchr(path, '/'), "/libcuda.so.1");
	library = dlopen(path, RTLD_NOW);
	if (!library) abort();
	init = find("cuInit");
	init(0);
	if (!ask) {
		code = act(action, pid);
		return code ? complain(code) : 0;
	}
	get = find(ask == 's' ? "cuCheckpointProcessGetState" : "cuCheckpointProcessGetRestoreThreadId");
	code = get(pid, &value);
	if (code == 1 && ask == 'r') {
		fprintf(stderr, "Could not find restore thread for process ID %d\n", pid);
		return 1;
	}
	if (code) return complain(code);
	if (ask == 's') puts(states[value]);
	else printf("%d\n", value);
	return 0;
}

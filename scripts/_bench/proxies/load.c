/* The clients of the benchmark: one thread, one epoll, little work per chunk.

   load ADDRESS MODEL     ADDRESS is 127.0.0.1:PORT or the path of a unix socket

   Commands come on stdin, one a line; each is answered by one line of JSON on stdout:

   streams N SEED USER    keep N streams open, a chunk each 20 ms * SEED; answered when all flow.
                          USER is spread or together, see stub.c
   measure SECONDS        chunks received meanwhile and their age on arrival
   first COUNT            COUNT requests for a stream of one chunk, one after the other, 5 ms apart:
                          time from the request to the first byte of the answer
   short CONNECTIONS N    N requests without a stream, as fast as they are answered

   Ages come from the time that stub writes into each chunk. What is not a 200, or a connection
   that ends, ends this program with a message. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define STAMP 22       /* "T=" and 20 digits */
#define TAIL 21        /* of a read: where a stamp may have begun */
#define TOP_US 2000000 /* ages beyond are counted as this */
#define PAUSE_NS 5000000LL

enum kind { STREAM, FIRST, SHORT };

struct client {
    int fd;
    enum kind kind;
    int flowing;        /* has had a chunk */
    long long asked;    /* when the request was sent; 0 = nothing is asked */
    size_t used;        /* STREAM: the tail of the last read; else the answer so far */
    char data[8192];
};

struct ages {
    unsigned count[TOP_US + 1], total;
};

static const char *address, *model;
static char request[3][1024];
static int request_size[3], poll_fd;
static struct ages ages;
static int measuring;
static int want_streams, flowing;
static long left, running;           /* requests to begin, and begun */
static struct client *prober;
static long long next_first;         /* when to ask next; 0 = not now */
static long long began, until;
static struct rusage usage_before;
static char command[32];             /* under way; "" = none */

static long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, errno ? strerror(errno) : "unexpected");
    exit(1);
}

static void note(long long age_ns) {
    long us = age_ns < 0 ? 0 : age_ns / 1000;
    ages.count[us > TOP_US ? TOP_US : us]++;
    ages.total++;
}

static long percentile(double part) {
    unsigned long wanted = (unsigned long)(part * ages.total), seen = 0;
    for (long us = 0; us <= TOP_US; us++) {
        seen += ages.count[us];
        if (seen > wanted) return us;
    }
    return -1;
}

static double cpu_seconds(const struct rusage *usage) {
    return usage->ru_utime.tv_sec + usage->ru_stime.tv_sec +
           (usage->ru_utime.tv_usec + usage->ru_stime.tv_usec) / 1e6;
}

static void begin(const char *name) {
    strcpy(command, name);
    memset(&ages, 0, sizeof ages);
    getrusage(RUSAGE_SELF, &usage_before);
    began = now_ns();
}

static void done(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("{\"count\": %u, \"seconds\": %.4f, \"cpu_seconds\": %.4f, \"p50_us\": %ld, "
           "\"p99_us\": %ld, \"max_us\": %ld}\n",
           ages.total, (now_ns() - began) / 1e9, cpu_seconds(&usage) - cpu_seconds(&usage_before),
           percentile(0.5), percentile(0.99), percentile(0.999999));
    fflush(stdout);
    command[0] = 0;
}

static void ask(struct client *c) {
    c->used = 0;
    c->asked = now_ns();
    if (send(c->fd, request[c->kind], request_size[c->kind], MSG_NOSIGNAL) !=
        request_size[c->kind])
        die("cannot send a request");
}

static struct client *connect_one(enum kind kind) {
    struct sockaddr_un local = {.sun_family = AF_UNIX};
    struct sockaddr_in inet = {.sin_family = AF_INET};
    const char *colon = strrchr(address, ':');
    int unix_socket = address[0] == '/', one = 1;
    struct client *c = calloc(1, sizeof *c);
    c->kind = kind;
    c->fd = socket(unix_socket ? AF_UNIX : AF_INET, SOCK_STREAM, 0);
    strncpy(local.sun_path, address, sizeof local.sun_path - 1);
    inet.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (!unix_socket) inet.sin_port = htons(atoi(colon + 1));
    if (unix_socket ? connect(c->fd, (struct sockaddr *)&local, sizeof local)
                    : connect(c->fd, (struct sockaddr *)&inet, sizeof inet))
        die("cannot connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &event)) die("epoll_ctl");
    ask(c);
    return c;
}

static void close_one(struct client *c) {
    close(c->fd);
    free(c);
}

static void check_status(const char *data, size_t size) {
    if (size < 12 || strncmp(data + 9, "200", 3)) {
        fprintf(stderr, "%.*s\n", (int)size, data);
        die("an answer that is not 200");
    }
}

/* Stamps may be cut by the end of a read: the last TAIL bytes are looked at again with the next. */
static void stream_bytes(struct client *c, char *data, size_t size, long long now) {
    char *from = data, *end = data + size, *stamp;
    while ((stamp = memmem(from, end - from, "T=", 2)) && end - stamp >= STAMP) {
        char digits[21];
        memcpy(digits, stamp + 2, 20);
        digits[20] = 0;
        if (measuring) note(now - strtoll(digits, NULL, 10));
        if (!c->flowing) {
            c->flowing = 1;
            flowing++;
        }
        from = stamp + STAMP;
    }
    c->used = end - from < TAIL ? end - from : TAIL;
    memcpy(c->data, end - c->used, c->used);
}

static int whole(struct client *c) {
    if (c->kind == FIRST) return c->used > 5 && !memcmp(c->data + c->used - 5, "0\r\n\r\n", 5);
    c->data[c->used] = 0;
    char *end = strstr(c->data, "\r\n\r\n");
    char *length = end ? strcasestr(c->data, "\r\ncontent-length:") : NULL;
    if (end && !length) die("an answer without a length");
    return end && c->used >= end + 4 - c->data + strtoul(length + 17, NULL, 10);
}

static void answered(struct client *c, long long now) {
    check_status(c->data, c->used);
    c->asked = 0;
    running--;
    if (c->kind == FIRST) {
        next_first = left > 0 ? now + PAUSE_NS : 0;
        if (!left) close_one(c), prober = NULL;
    } else if (left > 0) {
        left--;
        running++;
        ask(c);
    } else {
        close_one(c);
    }
    if (left == 0 && running == 0) done();
}

static void readable(struct client *c) {
    static char buffer[65536 + TAIL];
    if (c->kind == STREAM) memcpy(buffer, c->data, c->used);
    char *to = c->kind == STREAM ? buffer + c->used : c->data + c->used;
    ssize_t got = recv(c->fd, to, c->kind == STREAM ? 65536 : sizeof c->data - 1 - c->used, 0);
    if (got <= 0) die("a connection ended");
    long long now = now_ns();
    if (c->kind == STREAM) {
        if (c->asked) check_status(to, got);
        c->asked = 0;
        stream_bytes(c, buffer, c->used + got, now);
        return;
    }
    if (c->used == 0) note(now - c->asked);
    c->used += got;
    if (whole(c)) answered(c, now);
}

static void write_requests(int seed, const char *user) {
    static const char *more[] = {
        ",\"stream\":true,\"max_tokens\":100000000,\"seed\":%d,\"user\":\"%s\"",
        ",\"stream\":true,\"max_tokens\":1", ""};
    for (int kind = STREAM; kind <= SHORT; kind++) {
        char tail[128], body[512];
        snprintf(tail, sizeof tail, more[kind], seed, user);
        int size = snprintf(body, sizeof body,
                            "{\"model\":\"%s\",\"messages\":[{\"role\":\"user\",\"content\":"
                            "\"Say hello.\"}]%s}", model, tail);
        request_size[kind] = snprintf(
            request[kind], sizeof request[kind],
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n"
            "Content-Type: application/json\r\nUser-Agent: bench/1\r\nContent-Length: %d\r\n\r\n%s",
            size, body);
    }
}

static void obey(char *line) {
    double first = 0, second = 0;
    char name[32], user[32] = "spread";
    if (sscanf(line, "%31s %lf %lf %31s", name, &first, &second, user) < 2) die("a command without a number");
    begin(name);
    if (!strcmp(name, "streams")) {
        write_requests((int)second, user);
        for (; want_streams < (int)first; want_streams++) connect_one(STREAM);
    } else if (!strcmp(name, "measure")) {
        measuring = 1;
        until = began + (long long)(first * 1e9);
    } else if (!strcmp(name, "first")) {
        left = (long)first - 1;
        running = 1;
        prober = connect_one(FIRST);
    } else if (!strcmp(name, "short")) {
        left = (long)second;
        for (int i = 0; i < (int)first && left > 0; i++, left--, running++) connect_one(SHORT);
    } else {
        die("an unknown command");
    }
}

/* What is due by the clock. */
static void look_at_clock(void) {
    long long now = now_ns();
    if (!strcmp(command, "streams") && flowing >= want_streams) done();
    if (measuring && now >= until) {
        measuring = 0;
        done();
    }
    if (next_first && now >= next_first) {
        next_first = 0;
        left--;
        running++;
        ask(prober);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    address = argv[1];
    model = argv[2];
    write_requests(1, "spread");
    poll_fd = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, 0, &event)) die("epoll_ctl");
    for (;;) {
        struct epoll_event events[256];
        int count = epoll_wait(poll_fd, events, 256, command[0] ? 1 : -1);
        for (int i = 0; i < count; i++) {
            char line[128];
            if (events[i].data.ptr) readable(events[i].data.ptr);
            else if (!fgets(line, sizeof line, stdin)) return 0;
            else obey(line);
        }
        if (command[0]) look_at_clock();
    }
}

/* A stub engine that costs next to nothing: OpenAI chat completions over HTTP/1.1 keep-alive.

   stub SOCKET PORT       listens on the unix socket and on 127.0.0.1:PORT, one thread

   A request without "stream":true is answered at once. A stream gets "max_tokens" chunks, one every
   20 ms times "seed" (default 1). The streams' chunks are spread evenly over the 20 ms, or come all
   together where "user" is "together", as after one step of an engine. The text of each chunk is the
   time it was sent, "T=" and 20 digits: nanoseconds of CLOCK_MONOTONIC. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define ROUND_NS 20000000L
#define SLOTS 256
#define MAX_REQUEST 32768

struct connection {
    int fd;
    size_t used;
    char request[MAX_REQUEST];
    int streaming;      /* chunks left; 0 = no stream */
    int begun;          /* the head was sent */
    unsigned every, round;
    struct connection *next, **link; /* the other streams of its slot */
    char *rest;         /* what the peer has not taken yet */
    size_t rest_size;
};

static struct connection *slots[SLOTS];
static unsigned streams_ever, streams_now, slot_now;
static int poll_fd, timer_fd;

static const char HEAD[] =
    "HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n"
    "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static const char EVENT[] =
    "data: {\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion.chunk\","
    "\"created\":1700000000,\"model\":\"alpha\",\"choices\":[{\"index\":0,\"delta\":"
    "{\"content\":\"T=%020llu\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";
static const char LAST[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
static const char BODY[] =
    "{\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion\",\"created\":1700000000,"
    "\"model\":\"alpha\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
    "\"content\":\"Hello.\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":"
    "{\"prompt_tokens\":9,\"completion_tokens\":2,\"total_tokens\":11}}";

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void set_timer(int on) {
    long tick = on ? ROUND_NS / SLOTS : 0;
    struct itimerspec every = {{0, tick}, {0, tick}};
    if (timerfd_settime(timer_fd, 0, &every, NULL)) die("timerfd_settime");
}

static void end_stream(struct connection *c) {
    if (!c->link) return;
    *c->link = c->next;
    if (c->next) c->next->link = c->link;
    c->link = NULL;
    if (--streams_now == 0) set_timer(0);
}

static void drop(struct connection *c) {
    end_stream(c);
    close(c->fd);
    free(c->rest);
    free(c);
}

/* 0: sent or kept for later; -1: the peer is gone. */
static int send_all(struct connection *c, const char *data, size_t size) {
    ssize_t sent = 0;
    if (!c->rest_size) {
        sent = send(c->fd, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) return -1;
        if (sent < 0) sent = 0;
        if ((size_t)sent == size) return 0;
    }
    c->rest = realloc(c->rest, c->rest_size + size - sent);
    memcpy(c->rest + c->rest_size, data + sent, size - sent);
    c->rest_size += size - sent;
    return 0;
}

/* 1: nothing is left over. */
static int flush(struct connection *c) {
    if (!c->rest_size) return 1;
    ssize_t sent = send(c->fd, c->rest, c->rest_size, MSG_NOSIGNAL);
    if (sent > 0) {
        c->rest_size -= sent;
        memmove(c->rest, c->rest + sent, c->rest_size);
    }
    return c->rest_size == 0;
}

static int send_chunk(struct connection *c) {
    char data[2048], event[512];
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int size = snprintf(event, sizeof event, EVENT, now.tv_sec * 1000000000ULL + now.tv_nsec);
    int used = c->begun ? 0 : snprintf(data, sizeof data, "%s", HEAD);
    used += snprintf(data + used, sizeof data - used, "%x\r\n%s\r\n", size, event);
    c->begun = 1;
    if (--c->streaming == 0) {
        used += snprintf(data + used, sizeof data - used, "%s", LAST);
        end_stream(c);
    }
    return send_all(c, data, used);
}

static void begin_stream(struct connection *c, int together) {
    struct connection **slot = &slots[together ? 0 : streams_ever++ % SLOTS];
    c->next = *slot;
    if (c->next) c->next->link = &c->next;
    *slot = c;
    c->link = slot;
    c->round = 0;
    if (streams_now++ == 0) set_timer(1);
}

static long number_after(const char *body, const char *key, long otherwise) {
    const char *found = strstr(body, key);
    return found ? strtol(found + strlen(key), NULL, 10) : otherwise;
}

/* -1: the peer is gone. */
static int answer(struct connection *c, const char *body) {
    if (!strstr(body, "\"stream\":true") && !strstr(body, "\"stream\": true")) {
        char data[1024];
        int size = snprintf(data, sizeof data,
                            "HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 12:00:00 GMT\r\n"
                            "server: uvicorn\r\ncontent-length: %zu\r\n"
                            "content-type: application/json\r\n\r\n%s",
                            sizeof BODY - 1, BODY);
        return send_all(c, data, size);
    }
    c->streaming = number_after(body, "\"max_tokens\":", 1);
    c->every = number_after(body, "\"seed\":", 1);
    c->begun = 0;
    if (c->streaming == 1) return send_chunk(c);
    begin_stream(c, strstr(body, "\"together\"") != NULL);
    return 0;
}

static int readable(struct connection *c) {
    ssize_t got = recv(c->fd, c->request + c->used, MAX_REQUEST - 1 - c->used, 0);
    if (got <= 0) return got < 0 && errno == EAGAIN ? 0 : -1;
    c->used += got;
    c->request[c->used] = 0;
    for (;;) {
        char *end = strstr(c->request, "\r\n\r\n");
        if (!end) return c->used < MAX_REQUEST - 1 ? 0 : -1;
        char *length = strcasestr(c->request, "\r\ncontent-length:");
        size_t head = end + 4 - c->request;
        size_t body = length && length < end ? strtoul(length + 17, NULL, 10) : 0;
        if (c->used < head + body) return 0;
        char kept = c->request[head + body];
        c->request[head + body] = 0;
        if (answer(c, c->request + head)) return -1;
        c->request[head + body] = kept;
        c->used -= head + body;
        memmove(c->request, c->request + head + body, c->used + 1);
    }
}

static void tick(void) {
    uint64_t times;
    if (read(timer_fd, &times, sizeof times) != sizeof times) return;
    for (; times; times--, slot_now = (slot_now + 1) % SLOTS) {
        struct connection *c = slots[slot_now], *next;
        for (; c; c = next) {
            next = c->next;
            if (c->round++ % c->every == 0 && flush(c) && send_chunk(c)) drop(c);
        }
    }
}

static void watch(int fd, void *what) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = what};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event)) die("epoll_ctl");
}

static int listen_on(struct sockaddr *address, socklen_t size) {
    int one = 1, fd = socket(address->sa_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, address, size) || listen(fd, 4096)) die("bind");
    return fd;
}

static void accept_all(int listener) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct connection *c = calloc(1, sizeof *c);
        c->fd = fd;
        watch(fd, c);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    struct sockaddr_un local = {.sun_family = AF_UNIX};
    strncpy(local.sun_path, argv[1], sizeof local.sun_path - 1);
    unlink(argv[1]);
    struct sockaddr_in inet = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    inet.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listeners[2] = {listen_on((struct sockaddr *)&local, sizeof local),
                        listen_on((struct sockaddr *)&inet, sizeof inet)};
    poll_fd = epoll_create1(0);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    watch(timer_fd, &timer_fd);
    watch(listeners[0], &listeners[0]);
    watch(listeners[1], &listeners[1]);
    puts("listening");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[256];
        int count = epoll_wait(poll_fd, events, 256, -1), timed = 0;
        for (int i = 0; i < count; i++) {
            void *what = events[i].data.ptr;
            if (what == &timer_fd) timed = 1;
            else if (what == &listeners[0] || what == &listeners[1]) accept_all(*(int *)what);
            else if (readable(what)) drop(what);
        }
        if (timed) tick(); /* last: it may drop connections that have events in this batch */
    }
}

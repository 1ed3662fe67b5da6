/* A fast streaming OpenAI-compatible server with known timing, for measuring clients.
 *
 *   server PORT FIRST_MS GAP_MS
 *
 * Each request gets max_tokens chunks: the first FIRST_MS after its last byte reached the kernel, the others GAP_MS
 * apart, at absolute times. One thread, epoll and a timerfd, real-time priority where that is allowed. GET /stats answers with what really happened since the
 * last GET /reset: the times from a request's arrival to its first chunk, the gaps between chunks, and how late the
 * server itself was against its schedule. Those are the truth that a client's figures are compared with.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_FDS 65536
#define BUFFER (1 << 20)

typedef struct {
  int active, chat, chunks, sent, want_usage, want_running_usage, prompt_tokens;
  int64_t due_ns, arrival_ns, last_ns;
  char *in;
  size_t in_len, in_cap;
  char *out; /* what the socket did not take */
  size_t out_len;
} Conn;

typedef struct {
  int64_t *v;
  size_t n, cap;
} Sample;

static Conn *conns[MAX_FDS];
static struct {
  int64_t due_ns;
  int fd;
} heap[MAX_FDS];
static int heap_n;
static int epoll_fd, timer_fd;
static int64_t first_ns, gap_ns;
static Sample ttft, gaps, late;
static int64_t first_arrival_ns; /* of the first request for at least 16 tokens since the last reset */

static int64_t now_ns(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void add(Sample *s, int64_t value) {
  if (s->n == s->cap) s->v = realloc(s->v, (s->cap = s->cap ? 2 * s->cap : 65536) * sizeof *s->v);
  s->v[s->n++] = value;
}

static int by_value(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return x < y ? -1 : x > y;
}

static double quantile_ms(Sample *s, double q) {
  if (!s->n) return 0;
  size_t k = (size_t)(q * s->n + 0.999999);
  return s->v[k ? (k > s->n ? s->n - 1 : k - 1) : 0] / 1e6;
}

static void heap_push(int64_t due_ns, int fd) {
  int i = heap_n++;
  while (i && heap[(i - 1) / 2].due_ns > due_ns) heap[i] = heap[(i - 1) / 2], i = (i - 1) / 2;
  heap[i].due_ns = due_ns, heap[i].fd = fd;
}

static int heap_pop(void) {
  int fd = heap[0].fd, i = 0, child;
  int64_t due_ns = heap[--heap_n].due_ns;
  while ((child = 2 * i + 1) < heap_n) {
    if (child + 1 < heap_n && heap[child + 1].due_ns < heap[child].due_ns) child++;
    if (due_ns <= heap[child].due_ns) break;
    heap[i] = heap[child], i = child;
  }
  heap[i] = heap[heap_n];
  return fd;
}

static void drop(int fd) {
  Conn *c = conns[fd];
  if (!c) return;
  for (int i = 0; i < heap_n; i++)
    if (heap[i].fd == fd) heap[i].fd = -1; /* its entry runs out without effect */
  free(c->in), free(c->out), free(c);
  conns[fd] = NULL;
  close(fd);
}

static void put(int fd, const char *data, size_t size) {
  Conn *c = conns[fd];
  ssize_t sent = 0;
  if (!c) return;
  if (!c->out_len) {
    sent = send(fd, data, size, MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno != EAGAIN) {
        drop(fd);
        return;
      }
      sent = 0;
    }
  }
  if ((size_t)sent < size) {
    c->out = realloc(c->out, c->out_len + size - sent);
    memcpy(c->out + c->out_len, data + sent, size - sent);
    c->out_len += size - sent;
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, fd, &e);
  }
}

static void flush(int fd) {
  Conn *c = conns[fd];
  while (c->out_len) {
    ssize_t sent = send(fd, c->out, c->out_len, MSG_NOSIGNAL);
    if (sent <= 0) return;
    memmove(c->out, c->out + sent, c->out_len -= sent);
  }
  struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
  epoll_ctl(epoll_fd, EPOLL_CTL_MOD, fd, &e);
}

static void plain(int fd, const char *body) {
  char text[4096];
  int n = snprintf(text, sizeof text,
                   "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", strlen(body), body);
  put(fd, text, n);
}

static void stats(int fd) {
  struct rusage use;
  char body[1024];
  getrusage(RUSAGE_SELF, &use);
  qsort(ttft.v, ttft.n, sizeof *ttft.v, by_value);
  qsort(gaps.v, gaps.n, sizeof *gaps.v, by_value);
  qsort(late.v, late.n, sizeof *late.v, by_value);
  snprintf(body, sizeof body,
           "{\"requests\":%zu,\"chunks\":%zu,\"ttft_p50_ms\":%.6f,\"ttft_p99_ms\":%.6f,\"itl_p50_ms\":%.6f,"
           "\"itl_p99_ms\":%.6f,\"late_p50_ms\":%.6f,\"late_p99_ms\":%.6f,\"late_max_ms\":%.6f,\"cpu_s\":%.6f,\"first_arrival_s\":%.6f}",
           ttft.n, late.n, quantile_ms(&ttft, 0.5), quantile_ms(&ttft, 0.99), quantile_ms(&gaps, 0.5),
           quantile_ms(&gaps, 0.99), quantile_ms(&late, 0.5), quantile_ms(&late, 0.99), quantile_ms(&late, 1.0),
           use.ru_utime.tv_sec + use.ru_stime.tv_sec + (use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6,
           first_arrival_ns / 1e9);
  plain(fd, body);
}

static long number_after(const char *text, const char *key, long otherwise) {
  const char *at = strstr(text, key);
  if (!at) return otherwise;
  at += strlen(key);
  while (*at == ' ' || *at == ':') at++;
  return strtol(at, NULL, 10);
}

/* One whole request lies in c->in; answers it at once or schedules its first chunk. Returns the bytes it took. */
static size_t request(int fd, int64_t arrival_ns) {
  Conn *c = conns[fd];
  char *body = memmem(c->in, c->in_len, "\r\n\r\n", 4);
  if (!body) return 0;
  body += 4;
  size_t head = body - c->in, length = 0;
  char saved = *body;
  *body = 0;
  char *header = strcasestr(c->in, "\r\ncontent-length:");
  if (header) length = strtoul(header + 17, NULL, 10);
  *body = saved;
  if (c->in_len < head + length) return 0;
  saved = body[length];
  body[length] = 0;
  if (!strncmp(c->in, "GET /stats", 10)) {
    stats(fd);
  } else if (!strncmp(c->in, "GET /reset", 10)) {
    ttft.n = gaps.n = late.n = 0, first_arrival_ns = 0;
    plain(fd, "{}");
  } else if (!strncmp(c->in, "GET ", 4)) {
    plain(fd, "{\"object\":\"list\",\"data\":[{\"id\":\"stub\",\"object\":\"model\",\"created\":0,\"owned_by\":\"x\"}]}");
  } else {
    c->chat = !strncmp(c->in, "POST /v1/chat", 13);
    c->chunks = number_after(body, "\"max_tokens\"", number_after(body, "\"max_completion_tokens\"", 16));
    c->want_usage = strstr(body, "\"include_usage\"") != NULL;
    c->want_running_usage = strstr(body, "\"continuous_usage_stats\":true") || strstr(body, "\"continuous_usage_stats\": true");
    c->prompt_tokens = 1;
    for (size_t i = 0; i < length; i++) c->prompt_tokens += body[i] == ',' || body[i] == ' ';
    if (!first_arrival_ns && c->chunks >= 16) first_arrival_ns = arrival_ns;
    c->sent = 0, c->active = 1;
    c->arrival_ns = arrival_ns, c->due_ns = arrival_ns + first_ns;
    heap_push(c->due_ns, fd);
  }
  if (conns[fd]) body[length] = saved;
  return head + length;
}

static void readable(int fd) {
  Conn *c = conns[fd];
  char control[64];
  if (c->in_cap - c->in_len < 65536) c->in = realloc(c->in, c->in_cap = c->in_cap ? 2 * c->in_cap : BUFFER / 8);
  struct iovec part = {c->in + c->in_len, c->in_cap - c->in_len - 1};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
  ssize_t n = recvmsg(fd, &message, 0);
  if (n <= 0) {
    if (n == 0 || errno != EAGAIN) drop(fd);
    return;
  }
  int64_t arrival_ns = now_ns(CLOCK_MONOTONIC);
  for (struct cmsghdr *m = CMSG_FIRSTHDR(&message); m; m = CMSG_NXTHDR(&message, m))
    if (m->cmsg_type == SO_TIMESTAMPNS) {
      struct timespec t;
      memcpy(&t, CMSG_DATA(m), sizeof t);
      arrival_ns -= now_ns(CLOCK_REALTIME) - (t.tv_sec * 1000000000LL + t.tv_nsec);
    }
  c->in_len += n;
  size_t taken;
  while (conns[fd] && !c->active && c->in_len && (taken = request(fd, arrival_ns)))
    memmove(c->in, c->in + taken, c->in_len -= taken);
}

static int event(char *out, Conn *c, int last) {
  char json[1024], usage[128] = "";
  int n;
  int tokens = c->sent + !last;
  if (last || c->want_running_usage)
    snprintf(usage, sizeof usage, ",\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%d,\"completion_tokens\":%d}",
             c->prompt_tokens, c->prompt_tokens + tokens, tokens);
  const char *kind = c->chat ? "chat.completion.chunk" : "text_completion";
  const char *choice = last ? ""
      : c->chat ? "{\"index\":0,\"delta\":{\"content\":\" a\"},\"logprobs\":null,\"finish_reason\":null}"
                : "{\"index\":0,\"text\":\" a\",\"logprobs\":null,\"finish_reason\":null,\"stop_reason\":null}";
  n = snprintf(json, sizeof json,
               "data: {\"id\":\"cmpl-9f3b1c9d2e7a4f60a1b2c3d4e5f60718\",\"object\":\"%s\",\"created\":1700000000,"
               "\"model\":\"stub\",\"choices\":[%s]%s}\n\n", kind, choice, usage);
  return sprintf(out, "%x\r\n%s\r\n", n, json);
}

static void chunk(int fd) {
  Conn *c = conns[fd];
  char out[4096];
  int n = 0;
  if (!c || !c->active) return;
  if (!c->sent)
    n = sprintf(out, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n");
  n += event(out + n, c, 0);
  c->sent++;
  int done = c->sent >= c->chunks;
  int64_t at_ns = now_ns(CLOCK_MONOTONIC);
  put(fd, out, n);
  if (conns[fd] != c) return;
  add(&late, at_ns - c->due_ns);
  add(c->sent == 1 ? &ttft : &gaps, at_ns - (c->sent == 1 ? c->arrival_ns : c->last_ns));
  c->last_ns = at_ns;
  if (!done) {
    c->due_ns += gap_ns;
    heap_push(c->due_ns, fd);
    return;
  }
  n = c->want_usage ? event(out, c, 1) : 0;
  n += sprintf(out + n, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
  c->active = 0;
  put(fd, out, n);
}

int main(int argc, char **argv) {
  if (argc != 4) return fprintf(stderr, "usage: server PORT FIRST_MS GAP_MS\n"), 2;
  signal(SIGPIPE, SIG_IGN);
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  first_ns = atof(argv[2]) * 1e6, gap_ns = atof(argv[3]) * 1e6;
  int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) return perror("listen"), 1;
  setsockopt(listener, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof one); /* what arrives before accept is stamped too */
  struct sched_param priority = {.sched_priority = 1}; /* where allowed: other programs must not make it late */
  sched_setscheduler(0, SCHED_RR, &priority);
  epoll_fd = epoll_create1(0);
  timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
  struct epoll_event e = {.events = EPOLLIN, .data.fd = listener}, events[256];
  epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &e);
  e.data.fd = timer_fd;
  epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &e);
  for (;;) {
    if (heap_n) {
      struct itimerspec at = {.it_value = {heap[0].due_ns / 1000000000, heap[0].due_ns % 1000000000}};
      timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &at, NULL);
    }
    int ready = epoll_wait(epoll_fd, events, 256, -1);
    while (heap_n && heap[0].due_ns <= now_ns(CLOCK_MONOTONIC)) {
      int fd = heap_pop();
      if (fd >= 0) chunk(fd);
    }
    for (int i = 0; i < ready; i++) {
      int fd = events[i].data.fd;
      if (fd == timer_fd) {
        uint64_t fired;
        if (read(timer_fd, &fired, 8) < 0) continue;
      } else if (fd == listener) {
        int client;
        while ((client = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
          setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
          setsockopt(client, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof one);
          conns[client] = calloc(1, sizeof(Conn));
          e.events = EPOLLIN, e.data.fd = client;
          epoll_ctl(epoll_fd, EPOLL_CTL_ADD, client, &e);
        }
      } else if (conns[fd]) {
        if (events[i].events & EPOLLOUT) flush(fd);
        if (conns[fd] && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(fd);
      }
    }
  }
}

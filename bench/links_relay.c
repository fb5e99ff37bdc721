/* Links between network namespaces where the kernel has no netem: holds packets back as a cable would.
 *
 *     links_relay HUB FD...        descriptors of TUN devices, packets without a header of their own
 *
 * Link i joins FD number i with the hub. A packet takes its place behind those that go the same way, at the link's rate,
 * and arrives after the delay. Lines on stdin shape it, each answered by "ok":
 *
 *     LINK DELAY_NS NS_PER_KIB UP  delay of one way; 0 ns per KiB: no limit of the rate; up 0: the cable is cut
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define MOST_LINKS 64
#define MOST_BYTES 65536
#define MOST_QUEUED (64 << 20)

typedef struct packet {
    struct packet *next;
    int64_t due;
    size_t size;
    uint8_t data[];
} packet;

typedef struct {
    packet *head, *tail;
    int64_t free_at; /* the cable carries what was sent before */
    size_t queued;   /* bytes */
} way;

static struct {
    int64_t delay, ns_per_kib;
    int up;
    way out, in; /* to the node, from it */
} links[MOST_LINKS];

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void put(int link, way *w, const uint8_t *data, size_t size) {
    if (!links[link].up || w->queued + size > MOST_QUEUED) return;
    packet *p = malloc(sizeof *p + size);
    if (p == NULL) return;
    const int64_t t = now();
    if (w->free_at < t) w->free_at = t;
    w->free_at += (int64_t)size * links[link].ns_per_kib / 1024;
    *p = (packet){.due = w->free_at + links[link].delay, .size = size};
    memcpy(p->data, data, size);
    if (w->head == NULL) w->head = p;
    else w->tail->next = p;
    w->tail = p;
    w->queued += size;
}

/* Hands over what is due; the time of what comes next, or `next`. */
static int64_t hand_over(way *w, int fd, int up, int64_t next) {
    while (w->head != NULL && (!up || w->head->due <= now())) {
        packet *p = w->head;
        if (up && write(fd, p->data, p->size) < 0 && errno == EAGAIN) break;
        w->head = p->next;
        w->queued -= p->size;
        free(p);
    }
    return w->head != NULL && w->head->due < next ? w->head->due : next;
}

/* The node whose address a packet has: 198.18.NET.2 is the first one's. -1: none. */
static int node_of(const uint8_t *data, size_t size, int n) {
    if (size < 20 || data[0] >> 4 != 4) return -1;
    const int node = data[19] - 2;
    return node >= 0 && node < n ? node : -1;
}

static int shape(char *line, int n) {
    long long delay, ns_per_kib;
    int link, up;
    if (sscanf(line, "%d %lld %lld %d", &link, &delay, &ns_per_kib, &up) != 4 || link < 0 || link >= n) return -1;
    links[link].delay = delay;
    links[link].ns_per_kib = ns_per_kib;
    links[link].up = up;
    puts("ok");
    return fflush(stdout);
}

int main(int argc, char **argv) {
    static uint8_t data[MOST_BYTES];
    const int n = argc - 2;
    if (n < 1 || n > MOST_LINKS) return 2;
    struct pollfd fds[MOST_LINKS + 2] = {{.fd = 0, .events = POLLIN}};
    for (int i = 0; i <= n; i++) {
        fds[i + 1] = (struct pollfd){.fd = atoi(argv[i + 1]), .events = POLLIN};
        fcntl(fds[i + 1].fd, F_SETFL, O_NONBLOCK);
    }
    prctl(PR_SET_TIMERSLACK, 1000);
    for (;;) {
        int64_t next = INT64_MAX;
        for (int i = 0; i < n; i++) {
            next = hand_over(&links[i].out, fds[i + 2].fd, links[i].up, next);
            next = hand_over(&links[i].in, fds[1].fd, links[i].up, next);
        }
        int64_t left = next == INT64_MAX ? 1000000000 : next - now();
        if (left < 0) left = 0;
        const struct timespec t = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
        if (ppoll(fds, (nfds_t)n + 2, &t, NULL) <= 0) continue;
        if (fds[0].revents) {
            char line[256];
            if (fgets(line, sizeof line, stdin) == NULL || shape(line, n)) return 0;
        }
        for (int i = 0; i <= n; i++) {
            if (!(fds[i + 1].revents & POLLIN)) continue;
            const ssize_t size = read(fds[i + 1].fd, data, sizeof data);
            if (size <= 0) continue;
            const int link = i == 0 ? node_of(data, (size_t)size, n) : i - 1;
            if (link >= 0) put(link, i == 0 ? &links[link].out : &links[link].in, data, (size_t)size);
        }
    }
}

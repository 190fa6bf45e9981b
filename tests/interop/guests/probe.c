/*
 * What a guest measures from inside, by ICMP echo on a raw socket. Linked statically: it runs in an initramfs.
 *
 *   probe beat PEER INTERVAL_MS SECONDS
 *       one echo request after another at that interval; prints how many were answered, and the longest time
 *       without an answer.
 *
 *   probe hold PEER COUNT SIZE PER_SECOND [FILE]
 *       sends requests with SIZE bytes that differ in each: COUNT, or until FILE exists. It reads no answer before.
 *       Until then the guest's processor does not touch what the device wrote: if the guest is migrated meanwhile, a
 *       page that the device did not log arrives stale, and its bytes are wrong. Then every byte is compared.
 *
 * Exit status 0: beat heard at least one answer; hold found all answers (but for 2 %) and no wrong byte.
 */
#include <arpa/inet.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEADER = 8, MAX_SIZE = 60000 };

struct packet {
	struct icmphdr header;
	uint8_t body[MAX_SIZE];
};

static uint16_t ident;

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void sleep_until(double when)
{
	double left = when - now();

	if (left > 0)
		usleep(left * 1e6);
}

/* splitmix64, a stream of its own for every sequence number */
static void fill(uint8_t *body, int size, uint32_t sequence)
{
	uint64_t state = (uint64_t)sequence << 32;

	for (int i = 0; i < size; i++) {
		uint64_t z = state += 0x9e3779b97f4a7c15u;

		z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
		z = (z ^ z >> 27) * 0x94d049bb133111ebu;
		body[i] = z >> 56;
	}
}

static uint16_t checksum(const void *data, int length)
{
	const uint16_t *words = data;
	uint32_t sum = 0;

	for (; length > 1; length -= 2)
		sum += *words++;
	if (length)
		sum += *(const uint8_t *)words;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

static int open_socket(const char *peer)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	int fd = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP), room = 128 << 20;
	uint32_t only_replies = ~(1u << ICMP_ECHOREPLY);

	if (fd < 0 || !inet_aton(peer, &address.sin_addr) ||
	    connect(fd, (struct sockaddr *)&address, sizeof(address)) ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)) ||
	    setsockopt(fd, SOL_RAW, 1 /* ICMP_FILTER */, &only_replies, sizeof(only_replies))) {
		perror(peer);
		exit(2);
	}
	ident = htons(getpid() & 0xffff);
	return fd;
}

static int send_request(int fd, uint32_t sequence, int size)
{
	static struct packet p;

	memset(&p.header, 0, HEADER);
	p.header.type = ICMP_ECHO;
	p.header.un.echo.id = ident;
	p.header.un.echo.sequence = htons(sequence);
	fill(p.body, size, sequence);
	p.header.checksum = checksum(&p, HEADER + size);
	return send(fd, &p, HEADER + size, 0) >= 0;
}

/* The sequence number of the next answer, its bytes in *body; -1 if none comes in time, -2 if it is nobody's. */
static int receive(int fd, int wait_ms, uint8_t **body, int *size)
{
	static uint8_t data[sizeof(struct packet) + 60];
	struct pollfd ready = { .fd = fd, .events = POLLIN };
	struct icmphdr *header;
	int length, before;

	if (poll(&ready, 1, wait_ms < 0 ? 0 : wait_ms) <= 0)
		return -1;
	length = recv(fd, data, sizeof(data), MSG_DONTWAIT);
	before = (data[0] & 15) * 4;
	header = (struct icmphdr *)(data + before);
	if (length < before + HEADER || header->un.echo.id != ident)
		return -2;
	*body = data + before + HEADER;
	*size = length - before - HEADER;
	return ntohs(header->un.echo.sequence);
}

static int beat(const char *peer, double interval, double seconds)
{
	int fd = open_socket(peer), sent = 0, received = 0, size, got;
	double began = now(), next = began, last = 0, longest = 0;
	uint8_t *body;

	while (now() < began + seconds + 1) {
		if (now() >= next && next < began + seconds) {
			sent += send_request(fd, sent & 0xffff, 56);
			next = now() + interval;
		}
		got = receive(fd, next < began + seconds ? (next - now()) * 1e3 + 1 : 100, &body, &size);
		if (got < 0)
			continue;
		received++;
		if (last > 0 && now() - last > longest)
			longest = now() - last;
		last = now();
		if (received == sent && now() > began + seconds)
			break;
	}
	printf("sent=%d received=%d lost=%d longest_gap_ms=%.1f heard_until_s=%.1f\n", sent, received, sent - received,
	       longest * 1e3, last - began);
	return received == 0;
}

static int hold(const char *peer, int count, int size, double rate, const char *until)
{
	static uint8_t expected[MAX_SIZE], seen[65536];
	int fd = open_socket(peer), sent = 0, received = 0, wrong = 0, duplicate = 0, got, length;
	double began = now();
	uint8_t *body;

	for (int i = 0; i < count && (!until || access(until, F_OK)); i++) {
		int ok = 0;

		for (int attempt = 0; attempt < 50 && !(ok = send_request(fd, i, size)); attempt++)
			usleep(2000);
		sent += ok;
		sleep_until(began + (i + 1) / rate);
	}
	while (received < sent && (got = receive(fd, 1000, &body, &length)) != -1) {
		if (got == -2 || got >= count) {
			wrong++;
			continue;
		}
		received++;
		duplicate += seen[got]++ > 0;
		fill(expected, size, got);
		wrong += length != size || memcmp(expected, body, size) != 0;
	}
	printf("sent=%d received=%d wrong=%d duplicate=%d\n", sent, received, wrong, duplicate);
	return wrong || duplicate || received < sent * 0.98;
}

int main(int argc, char **argv)
{
	if (argc == 5 && !strcmp(argv[1], "beat"))
		return beat(argv[2], atof(argv[3]) / 1e3, atof(argv[4]));
	if ((argc == 6 || argc == 7) && !strcmp(argv[1], "hold") && atoi(argv[3]) <= 65536 && atoi(argv[4]) <= MAX_SIZE)
		return hold(argv[2], atoi(argv[3]), atoi(argv[4]), atof(argv[5]), argv[6]);
	fprintf(stderr, "probe: see its source for what it takes\n");
	return 2;
}

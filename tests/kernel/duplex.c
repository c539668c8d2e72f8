// SPDX-License-Identifier: Apache-2.0
// Streams of tiny messages both ways at once, as fast as a program can, each byte checked.
//
//   duplex connect|listen ADDRESS PORT CONNECTIONS BYTES
//
// One connection after the other. Says what went wrong, and ends with 1.
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define TINY 8
#define PATIENCE 20 // seconds without a byte

static unsigned char expected(size_t at)
{
	return (unsigned char)(at * 2654435761u >> 13);
}

static int failed(const char *what, size_t at)
{
	fprintf(stderr, "%s at byte %zu: %s\n", what, at, strerror(errno));
	return 1;
}

// Sends and takes `bytes` each way.
static int talk(int fd, size_t bytes)
{
	unsigned char out[TINY], in[4096];
	size_t sent = 0, taken = 0, i;
	time_t since = time(NULL);
	ssize_t n;

	while (sent < bytes || taken < bytes) {
		if (sent < bytes) {
			for (i = 0; i < TINY; i++)
				out[i] = expected(sent + i);
			n = send(fd, out, TINY - sent % TINY, MSG_DONTWAIT | MSG_NOSIGNAL);
			if (n < 0 && errno != EAGAIN)
				return failed("send", sent);
			sent += n > 0 ? (size_t)n : 0;
		}
		n = recv(fd, in, sizeof(in), MSG_DONTWAIT);
		if ((n < 0 && errno != EAGAIN) || (n == 0 && taken < bytes))
			return failed("recv", taken);
		for (i = 0; n > 0 && i < (size_t)n; i++)
			if (in[i] != expected(taken + i))
				return failed("wrong byte", taken + i);
		taken += n > 0 ? (size_t)n : 0;
		if (n > 0)
			since = time(NULL);
		else if (time(NULL) - since > PATIENCE)
			return failed("nothing comes", taken);
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in at = {.sin_family = AF_INET};
	int one = 1, listener = -1, fd, i;

	if (argc != 6)
		return 2;
	inet_pton(AF_INET, argv[2], &at.sin_addr);
	at.sin_port = htons((unsigned short)atoi(argv[3]));
	if (!strcmp(argv[1], "listen")) {
		listener = socket(AF_INET, SOCK_STREAM, 0);
		setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		if (bind(listener, (struct sockaddr *)&at, sizeof(at)) || listen(listener, 8))
			return failed("listen", 0);
	}
	for (i = 0; i < atoi(argv[4]); i++) {
		fd = listener < 0 ? socket(AF_INET, SOCK_STREAM, 0) : accept(listener, NULL, NULL);
		if (fd < 0 || (listener < 0 && connect(fd, (struct sockaddr *)&at, sizeof(at))))
			return failed("connect", 0);
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		if (talk(fd, (size_t)atol(argv[5])))
			return 1;
		close(fd);
	}
	return 0;
}

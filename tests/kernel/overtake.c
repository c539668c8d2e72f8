/* SPDX-License-Identifier: Apache-2.0 */
/* One thread sends until another shuts the socket down. In how many of so many rounds does the reader see the end
 * before bytes whose send() succeeded? Stops at the first; writes 0 or 1.
 *
 * usage: overtake ROUNDS */
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static char data[500000], taken[1 << 20];
static int sender, reader;
static long sent, received;
static volatile int go;

static void *send_all(void *unused)
{
	long one;

	while (!go)
		;
	while ((one = send(sender, data, sizeof(data), MSG_NOSIGNAL)) > 0)
		sent += one;
	return unused;
}

static void *read_all(void *unused)
{
	long one;

	while ((one = recv(reader, taken, sizeof(taken), 0)) > 0)
		received += one;
	return unused;
}

static void connect_them(int listener)
{
	struct sockaddr_in at;
	socklen_t size = sizeof(at);

	getsockname(listener, (struct sockaddr *)&at, &size);
	sender = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(sender, (struct sockaddr *)&at, size))
		exit(1);
	reader = accept(listener, 0, 0);
	for (int i = 0; i < 3; i++) /* each has heard of the other */
		if (send(sender, data, 1, 0) != 1 || recv(reader, taken, 1, 0) != 1 || send(reader, data, 1, 0) != 1 ||
		    recv(sender, taken, 1, 0) != 1)
			exit(1);
}

int main(int count, char **words)
{
	struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int listener = socket(AF_INET, SOCK_STREAM, 0), lost = 0;
	pthread_t writing, reading;

	if (bind(listener, (struct sockaddr *)&any, sizeof(any)) || listen(listener, 1))
		return 1;
	for (int left = count > 1 ? atoi(words[1]) : 1; left && !lost; left--) {
		connect_them(listener);
		sent = received = go = 0;
		pthread_create(&writing, 0, send_all, 0);
		pthread_create(&reading, 0, read_all, 0);
		go = 1;
		usleep(200 + left % 10 * 200);
		shutdown(sender, SHUT_WR);
		pthread_join(writing, 0);
		pthread_join(reading, 0);
		lost = sent != received;
		close(sender);
		close(reader);
	}
	printf("%d\n", lost);
	return 0;
}

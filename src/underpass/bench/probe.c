// SPDX-License-Identifier: Apache-2.0
// qperf's two TCP tests, with less around them: over an AF_UNIX stream, the practical limit on this machine, or
// over TCP between two network namespaces, or inside one.
//
//   underpass-probe tcp_lat|tcp_bw SIZE MILLISECONDS CLIENT_CPU SERVER_CPU
//                   [ADDRESS nagle|nodelay CLIENT_NETNS SERVER_NETNS CGROUP_PROCS]
//
// It enters namespaces and cgroup by itself: a container has no programs for that. Its name is its own, too: where
// underpass covers all of the node, a rule of this name keeps it out.
//
// Prints one number: microseconds one way, or Mb/s as the receiver counted them. Blocking calls,
// whole messages, one client and one server process, as in qperf.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t stopped;

static void on_alarm(int signal_number)
{
	(void)signal_number;
	stopped = 1;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	return sched_setaffinity(0, sizeof(set), &set);
}

static int failed(const char *what)
{
	perror(what);
	return 1;
}

// Before it has a socket: those belong to the cgroup that they were made in.
static int join_cgroup(const char *procs)
{
	int fd = open(procs, O_WRONLY | O_CLOEXEC), wrong = fd < 0 || write(fd, "0", 1) != 1;

	return wrong ? failed(procs) : close(fd);
}

// The two ends of a TCP connection, opened from this one thread inside their namespaces.
static int connect_tcp(char **where, int ends[2])
{
	struct sockaddr_in at = {.sin_family = AF_INET};
	socklen_t length = sizeof(at);
	int nodelay = !strcmp(where[1], "nodelay"), listener, i, netns;

	for (i = 0; i < 2; i++) { // the server's side first
		netns = open(where[3 - i], O_RDONLY | O_CLOEXEC);
		if (netns < 0 || setns(netns, CLONE_NEWNET))
			return failed(where[3 - i]);
		close(netns);
		ends[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (i == 1)
			break;
		listener = ends[0];
		if (inet_pton(AF_INET, where[0], &at.sin_addr) != 1 ||
		    bind(listener, (struct sockaddr *)&at, sizeof(at)) || listen(listener, 1) ||
		    getsockname(listener, (struct sockaddr *)&at, &length))
			return failed("listen");
	}
	if (connect(ends[0], (struct sockaddr *)&at, sizeof(at)))
		return failed("connect");
	ends[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	close(listener);
	if (ends[1] < 0)
		return failed("accept");
	for (i = 0; i < 2; i++)
		if (setsockopt(ends[i], IPPROTO_TCP, TCP_NODELAY, &nodelay, sizeof(nodelay)))
			return 1;
	return 0;
}

// Moves one whole message; 0 when the other end closed or the time is up.
static int move_whole(int fd, char *data, size_t size, int sending)
{
	size_t done = 0;

	while (done < size) {
		ssize_t n = sending ? send(fd, data + done, size - done, MSG_NOSIGNAL)
				    : recv(fd, data + done, size - done, 0);

		if (n <= 0)
			return 0;
		done += (size_t)n;
	}
	return 1;
}

static void serve_latency(int fd, char *data, size_t size)
{
	while (move_whole(fd, data, size, 0) && move_whole(fd, data, size, 1))
		;
}

// Counts the last two fifths, or all but the first 60 ms: TCP takes so long to come up to its speed.
static void serve_bandwidth(int fd, char *data, size_t size, size_t time_ms)
{
	double begin = now(), bytes = 0, first = begin, before = 0;
	double from = begin + (time_ms < 100 ? (double)time_ms * 0.6 : 60) / 1000;
	unsigned int reads = 0;
	ssize_t n;

	while ((n = recv(fd, data, size, 0)) > 0) {
		bytes += (double)n;
		if (from != 0 && !(++reads % 16) && now() >= from) {
			begin = now();
			before = bytes;
			bytes = from = 0;
		}
	}
	if (now() - begin < (double)time_ms / 4000) { // it had no processor until the end, or few messages came
		bytes += before;
		begin = first;
	}
	printf("%.4f\n", bytes * 8 / (now() - begin) / 1e6);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	int latency, ends[2], client_cpu, server_cpu;
	unsigned long trips = 0;
	struct itimerval timer;
	struct sigaction alarm_action;
	size_t size, time_ms;
	double begin;
	char *data;

	if (argc != 6 && argc != 11)
		return 2;
	latency = !strcmp(argv[1], "tcp_lat");
	size = strtoul(argv[2], NULL, 10);
	time_ms = strtoul(argv[3], NULL, 10);
	client_cpu = atoi(argv[4]);
	server_cpu = atoi(argv[5]);
	data = calloc(1, size);
	if (!data || !time_ms || (argc == 11 && join_cgroup(argv[10])) ||
	    (argc == 11 ? connect_tcp(argv + 6, ends) : socketpair(AF_UNIX, SOCK_STREAM, 0, ends)))
		return 1;
	if (!fork()) {
		close(ends[0]);
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (pin(server_cpu))
			_exit(1);
		if (latency)
			serve_latency(ends[1], data, size);
		else
			serve_bandwidth(ends[1], data, size, time_ms);
		_exit(0);
	}
	close(ends[1]);
	if (pin(client_cpu))
		return failed("sched_setaffinity");
	memset(&timer, 0, sizeof(timer));
	timer.it_value.tv_sec = (time_t)(time_ms / 1000);
	timer.it_value.tv_usec = (suseconds_t)(time_ms % 1000) * 1000;
	memset(&alarm_action, 0, sizeof(alarm_action));
	alarm_action.sa_handler = on_alarm;
	sigaction(SIGALRM, &alarm_action, NULL);
	begin = now();
	setitimer(ITIMER_REAL, &timer, NULL);
	if (latency) {
		while (!stopped && move_whole(ends[0], data, size, 1) &&
		       move_whole(ends[0], data, size, 0))
			trips++;
		if (!trips)
			return 1;
		printf("%.4f\n", (now() - begin) / (double)trips / 2 * 1e6);
	} else {
		while (!stopped && move_whole(ends[0], data, size, 1))
			;
	}
	fflush(stdout);
	close(ends[0]);
	wait(NULL);
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* A client without a C library, for 32 and for 64 bits: connects to 10.77.0.2:8081 and sends back what
 * it receives, until the other side ends. */
#ifdef __i386__
enum { READ = 3, WRITE = 4, EXIT = 1, SOCKET = 359, CONNECT = 362 };

static long call(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
	return result;
}
#else
enum { READ = 0, WRITE = 1, EXIT = 60, SOCKET = 41, CONNECT = 42 };

static long call(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c)
			 : "rcx", "r11", "memory");
	return result;
}
#endif

void _start(void)
{
	static const unsigned char server[16] = {2, 0, 8081 >> 8, 8081 & 255, 10, 77, 0, 2};
	static char buffer[4096];
	long fd = call(SOCKET, 2, 1, 0), got;

	if (call(CONNECT, fd, (long)server, sizeof(server)))
		call(EXIT, 1, 0, 0);
	while ((got = call(READ, fd, (long)buffer, sizeof(buffer))) > 0)
		call(WRITE, fd, (long)buffer, got);
	call(EXIT, got != 0, 0, 0);
}

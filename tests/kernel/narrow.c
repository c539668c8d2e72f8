/* SPDX-License-Identifier: Apache-2.0 */
/* Programs without a C library. The client, for 32 and for 64 bits, connects to 10.77.0.2:8081 and sends
 * back what it receives, until the other side ends. The server, for 32 bits, accepts from its standard
 * input and reads three records of 200 bytes with MSG_WAITALL; it returns how many came short. */
#ifdef __i386__
enum { READ = 3, WRITE = 4, EXIT = 1, SOCKET = 359, CONNECT = 362, ACCEPT4 = 364, RECVFROM = 371 };

static long call4(long number, long a, long b, long c, long d)
{
	long result;

	__asm__ volatile("int $0x80" : "=a"(result)
			 : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(0) : "memory");
	return result;
}

#define call(number, a, b, c) call4(number, a, b, c, 0)
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

#ifdef SERVER
void _start(void)
{
	static char buffer[4096];
	long fd = call4(ACCEPT4, 0, 0, 0, 0), missing = 0;

	for (int i = 0; i < 3; i++)
		missing += call4(RECVFROM, fd, (long)buffer, 200, 0x100) != 200;
	call(EXIT, missing, 0, 0);
}
#else
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
#endif

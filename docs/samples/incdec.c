/* A tiny emulator for emufuzz's command protocol: INC and DEC of EAX to EDI in 64-bit mode.
 * Build: cc -O2 -o incdec incdec.c        Use: emufuzz exec --engine cmd:./incdec
 * A real program would use a JSON library; the few strings that are needed here are searched for. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *names[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"};

/* The text of a string member, as a pointer behind its opening quote; NULL if it is absent. */
static const char *text_of(const char *line, const char *name)
{
	char key[32];
	const char *at;

	snprintf(key, sizeof key, "\"%s\":\"", name);
	at = strstr(line, key);
	return at ? at + strlen(key) : NULL;
}

static uint64_t number_of(const char *line, const char *name, uint64_t absent)
{
	const char *at = text_of(line, name);

	return at ? strtoull(at, NULL, 16) : absent;
}

static int byte_of(const char *hex, int index)
{
	char digits[3] = {0};

	memcpy(digits, hex + 2 * index, 2);
	return (int)strtol(digits, NULL, 16);
}

static void refuse(const char *line)
{
	const char *id = text_of(line, "id");

	printf("{\"id\":\"%.*s\",\"unsupported\":\"neither INC nor DEC of a 32-bit register\"}\n",
	       id ? (int)strcspn(id, "\"") : 0, id ? id : "");
}

static void run(const char *line)
{
	const char *code = text_of(line, "code"), *id = text_of(line, "id");
	uint64_t flags = number_of(line, "rflags", 2), rip = number_of(line, "rip", 0);
	uint32_t before, after;
	int modrm, down;

	if (!code || !id || strcspn(code, "\"") < 4 || byte_of(code, 0) != 0xff) {
		refuse(line);
		return;
	}
	modrm = byte_of(code, 1);
	if (modrm >> 4 != 0xc) {
		refuse(line);
		return;
	}
	down = modrm >> 3 & 1;
	before = (uint32_t)number_of(line, names[modrm & 7], 0);
	after = down ? before - 1 : before + 1;

	flags &= ~(uint64_t)(0x4 | 0x10 | 0x40 | 0x80 | 0x800);
	if (!__builtin_parity(after & 0xff))
		flags |= 0x4;
	if ((before & 15) == (down ? 0u : 15u))
		flags |= 0x10;
	if (!after)
		flags |= 0x40;
	if (after >> 31)
		flags |= 0x80;
	if (before == (down ? 0x80000000u : 0x7fffffffu))
		flags |= 0x800;
	printf("{\"id\":\"%.*s\",\"length\":2,\"rip\":\"0x%llx\",\"rflags\":\"0x%llx\",\"gpr\":{\"%s\":\"0x%x\"}}\n",
	       (int)strcspn(id, "\""), id, (unsigned long long)rip + 2, (unsigned long long)flags,
	       names[modrm & 7], after);
}

int main(void)
{
	char *line = NULL;
	size_t room = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("{\"emufuzz\":1,\"name\":\"incdec-c\",\"version\":\"1.0\",\"modes\":[\"prot64\"]}");
	while (getline(&line, &room, stdin) > 0)
		run(line);
	free(line);
	return 0;
}

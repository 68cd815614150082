"""The user's end of a talk: lines that are typed or come through a pipe, and commands."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from clusterfusion.chat.conversation import Conversation
from clusterfusion.serve.chat_template import TemplateRefusedError

HELP = """\
/help          this list
/reset         forget what was said
/system TEXT   begin anew, with TEXT as the system's message; without TEXT: with none
/exit          end, as Ctrl-D does
A line that ends with \\ goes on in the next; one that begins with // is text that begins with /.
Ctrl-C ends an answer; where there is none, the program."""

_TAKES_TEXT = {"system"}  # the other commands stand alone
INTERRUPTED = 130  # what a shell gives for SIGINT


class Console:
    """Reads lines and shows answers, until the lines end."""

    def __init__(self, conversation: Conversation, *, statistics: bool = False) -> None:
        """Takes a talk, and whether figures follow each answer."""
        self._conversation = conversation
        self._statistics = statistics
        self._is_terminal = sys.stdin.isatty()
        self._edits = self._is_terminal and sys.stdout.isatty()
        if self._edits:
            import readline  # noqa: F401 - input() edits lines and knows earlier ones by it
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._tell(HELP),
            "reset": lambda _: conversation.reset(conversation.system),
            "system": lambda text: conversation.reset(text or None),
            "exit": lambda _: self._end(),
            "quit": lambda _: self._end(),
        }
        self._has_ended = False

    def run(self) -> int:
        """Talks. Returns the exit code.

        In a terminal a message that cannot be answered is reported, and the talk goes on; otherwise
        it ends with code 1.
        """
        try:
            while not self._has_ended and (line := self._read()) is not None:
                if not self._obey(line) and not self._is_terminal:
                    return 1
        except KeyboardInterrupt:
            self._tell("")
            return INTERRUPTED
        if self._is_terminal and line is None:
            self._tell("")
        return 0

    def _read(self) -> str | None:
        """A message, of one line or several; None at the end."""
        lines: list[str] = []
        while True:
            try:
                line = self._read_line("... " if lines else "> ")
            except EOFError:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _read_line(self, prompt: str) -> str:
        if self._edits:
            return input(prompt)
        if self._is_terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _obey(self, line: str) -> bool:
        """Does what a line says. False if it cannot be done."""
        if not line.strip():
            return True
        if line.startswith("//"):
            return self._answer(line[1:])
        if not line.startswith("/"):
            return self._answer(line)
        name, text = re.fullmatch(r"(\S*)\s*(.*?)\s*", line[1:], re.DOTALL).groups()  # type: ignore
        command = self._commands.get(name)
        if command is None:
            self._tell(f"error: there is no command /{name}; /help lists them")
            return False
        if text and name not in _TAKES_TEXT:
            self._tell(
                f"error: /{name} stands alone, found {text!r} behind it; a message that begins "
                "with / is typed with //"
            )
            return False
        command(text)
        return True

    def _end(self) -> None:
        self._has_ended = True

    def _answer(self, text: str) -> bool:
        answer = self._conversation.answer(text)
        try:
            for piece in answer:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
        except (TemplateRefusedError, ValueError, NotImplementedError, ArithmeticError) as error:
            self._tell(f"error: {error}")
            return False
        finally:
            answer.close()
        print(flush=True)
        if self._statistics:
            self._tell_statistics()
        return True

    def _tell_statistics(self) -> None:
        last = self._conversation.last
        if last is None:
            return
        figures = last.statistics
        self._tell(
            f"prompt: {figures.prompt_tokens} tokens, {figures.prefix_hit_tokens} of them from the "
            f"cache; answer: {figures.new_tokens} tokens ({last.finish_reason}), "
            f"{figures.tokens_per_second:.1f} tokens/s"
        )

    @staticmethod
    def _tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

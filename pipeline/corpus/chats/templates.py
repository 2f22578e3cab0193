"""Chat templates: rendered as transformers renders them, but for the day, and watched while they write.

A template is compiled twice, as it is and *watched*. The watched one writes a mark, with a number, wherever an
iteration over the messages, a piece of the template or a `{% generation %}` block begins or ends, and notes what the
mark stands for: `pipeline.corpus.chats.roles` reads from that which message a stretch of the text belongs to. A watched
rendering says something only where it is, without its marks, the plain one: whoever uses it checks that.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.meta import find_undeclared_variables

from pipeline.corpus.chats.environment import GENERATION, environment
from pipeline.corpus.chats.messages import Chat

MARK = "\U0010ffff"
"""No character: Unicode keeps this number for uses like this. A mark is this and the digits of its number."""
MARK_DIGITS = 2
MARK_BASE, MARK_ZERO = 1 << 16, 0x10000
"""A digit d is the character MARK_ZERO + d."""
WATCH = "granary_watch"

REFUSALS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template raises for chats that it does not take: its own raise_exception, and what its expressions raise."""
DATE_CALLS = {"strftime_now", "now"}
DATE_TEXT = "date_string"
"""A variable with the day, which some templates (Llama 3) read if it is given."""
Kind = Literal["message", "leave", "open", "close", "generate", "generated"]


class Event(NamedTuple):
    """What a mark stands for."""

    kind: Kind
    loop: int
    message: int


@dataclass
class Watch:
    """What a watched template calls while it writes."""

    messages: Mapping[int, int]
    """The number of each message, by the identity of its dictionary."""
    events: list[Event] = field(default_factory=list)
    _active: list[int] = field(default_factory=list)
    """Loops that are in an iteration over messages, from the outside in."""

    def __call__(self, kind: Kind, loop: int = -1, value: Any = None) -> str:
        message = -1
        if kind == "message":
            message = self.messages.get(id(value), -1)
            if message < 0:
                return ""
            if loop not in self._active:
                self._active.append(loop)
        elif kind == "leave":
            if loop not in self._active:
                return ""
            del self._active[self._active.index(loop) :]
        elif self._active:
            return ""  # pieces matter only outside of iterations
        return self._mark(Event(kind, loop, message))

    def generation(self, caller: Callable[[], str]) -> str:
        before = self._mark(Event("generate", -1, -1))
        return f"{before}{caller()}{self._mark(Event('generated', -1, -1))}"

    def _mark(self, event: Event) -> str:
        high, low = divmod(len(self.events), MARK_BASE)
        self.events.append(event)
        return f"{MARK}{chr(MARK_ZERO + high)}{chr(MARK_ZERO + low)}"


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and what it is given besides chats."""

    source: str
    variables: tuple[tuple[str, Any], ...]
    """Names of special tokens, and arguments."""
    day: date
    learned: dict[str, str | None] = field(default_factory=dict, compare=False)
    """For `pipeline.corpus.chats.roles`: what stands before the content of a message of a role, by role."""

    def render(self, chat: Chat) -> str:
        """The text of a chat. Raises one of REFUSALS."""
        return self._plain.render(**self._given(chat), **{GENERATION: lambda caller: caller()})

    def watched(self, chat: Chat) -> tuple[str, list[Event]]:
        """The text with marks, and what each stands for, by its number. Raises one of REFUSALS.

        A template may write what it has kept in a variable later, more than once or never.
        """
        watch = Watch({id(message): number for number, message in enumerate(chat.messages)})
        text = self._watched.render(**self._given(chat), **{WATCH: watch, GENERATION: watch.generation})
        return text, watch.events

    @cached_property
    def literals(self) -> list[str]:
        """Every text in the template's expressions: those that it may look for in contents are among them."""
        return _texts(environment().parse(self.source).find_all(nodes.Const))

    @cached_property
    def sought(self) -> list[str]:
        """Those that it likely looks for: `'x' in content`, `content.split('x')`; no names, which are of keys."""
        tree = environment().parse(self.source)
        found: list[nodes.Node] = [test.expr for test in tree.find_all(nodes.Compare)]
        found += [argument for call in tree.find_all(nodes.Call) for argument in call.args]
        found += [argument for filtered in tree.find_all(nodes.Filter) for argument in filtered.args]
        return [text for text in _texts(found) if not text.isidentifier()]

    @cached_property
    def _plain(self) -> jinja2.Template:
        return _compiled(self.source, False)

    @cached_property
    def _watched(self) -> jinja2.Template:
        return _compiled(self.source, True)

    def _given(self, chat: Chat) -> dict[str, Any]:
        now = datetime.combine(self.day, time())
        # The names that transformers always gives, so that a template finds them defined.
        standard = {"documents": None, "add_generation_prompt": False, "strftime_now": now.strftime, "now": lambda: now}
        return {**standard, **dict(self.variables), "messages": chat.messages, "tools": chat.tools}


def check_template(source: str) -> str | None:
    """Why a template cannot be used, if it cannot."""
    try:
        _compiled(source, False)
    except jinja2.TemplateError as error:
        return str(error)
    return None


def variables_of(source: str) -> set[str]:
    """The names that a template reads of what it is given."""
    return set(find_undeclared_variables(environment().parse(source)))


def asks_for_the_day(source: str, given: Mapping[str, Any], day_is_given: bool) -> bool:
    """Whether what a template writes depends on the day. `date_string` counts if the day is given in the spec: without
    one, templates write a day of their own."""
    names = variables_of(source) - set(given)
    return bool(names & (DATE_CALLS | ({DATE_TEXT} if day_is_given else set())))


def _texts(found: Iterable[nodes.Node]) -> list[str]:
    """The texts among constants, the longest first."""
    texts = {node.value for node in found if isinstance(node, nodes.Const) and isinstance(node.value, str)}
    return sorted(texts - {""}, key=lambda text: (-len(text), text))


@lru_cache(maxsize=16)
def _compiled(source: str, watched: bool) -> jinja2.Template:
    made = environment()
    tree = made.parse(source)
    if watched:
        tree.body = _Watching().body(tree.body)
        tree.set_environment(made)
    return made.template_class.from_code(made, made.compile(tree), made.make_globals(None))


class _Watching:
    """Puts calls of the watch into a template. Macros and blocks that are kept in a variable are left alone: what they
    give may be changed before it is written, and counts where it is written."""

    def __init__(self) -> None:
        self.loops = 0

    def body(self, statements: list[nodes.Node]) -> list[nodes.Node]:
        return [watched for statement in statements for watched in self.statement(statement)]

    def statement(self, node: nodes.Node) -> list[nodes.Node]:
        if isinstance(node, nodes.Output):
            node.nodes = [_call("open"), *node.nodes, _call("close")]
        elif isinstance(node, nodes.For):
            return self.loop(node)
        elif isinstance(node, nodes.If):
            self.branches(node)
        elif isinstance(node, nodes.With | nodes.Scope | nodes.ScopedEvalContextModifier) or _is_generation(node):
            node.body = self.body(node.body)  # type: ignore[attr-defined]
        return [node]

    def branches(self, node: nodes.If) -> None:
        asks_role = any(_asks_role(test) for test in (node.test, *(branch.test for branch in node.elif_)))
        for branch in (node, *node.elif_):
            branch.body = _piece(self.body(branch.body)) if asks_role else self.body(branch.body)
        if node.else_:
            node.else_ = _piece(self.body(node.else_)) if asks_role else self.body(node.else_)

    def loop(self, node: nodes.For) -> list[nodes.Node]:
        self.loops += 1
        number = self.loops
        inside: list[nodes.Node] = []
        if isinstance(node.target, nodes.Name):
            inside.append(_output(_call("message", number, node.target.name)))
        for statement in node.body:
            inside += self.statement(statement)
            # Some templates count, and take the message by its number.
            if isinstance(statement, nodes.Assign) and isinstance(statement.target, nodes.Name) and _is_item(statement):
                inside.append(_output(_call("message", number, statement.target.name)))
        node.body = inside
        node.else_ = self.body(node.else_)
        return [node, _output(_call("leave", number))]


def _is_item(statement: nodes.Assign) -> bool:
    """Return whether what is assigned is an item that is taken by a variable: messages[i], not messages[i - 1]."""
    value = statement.node
    return isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Name)


def _is_generation(node: nodes.Node) -> bool:
    return (
        isinstance(node, nodes.CallBlock)
        and isinstance(node.call.node, nodes.Name)
        and node.call.node.name == GENERATION
    )


def _asks_role(test: nodes.Node) -> bool:
    """Return whether a condition is about a message's role: what stands under it is written for that message."""
    by_name = (node.attr == "role" for node in test.find_all(nodes.Getattr))
    by_item = (isinstance(n.arg, nodes.Const) and n.arg.value == "role" for n in test.find_all(nodes.Getitem))
    return any(by_name) or any(by_item)


def _piece(body: list[nodes.Node]) -> list[nodes.Node]:
    return [_output(_call("open")), *body, _output(_call("close"))]


def _output(node: nodes.Expr) -> nodes.Output:
    made = nodes.Output([node])
    made.set_lineno(1)
    return made


def _call(kind: Kind, loop: int = -1, name: str | None = None) -> nodes.Expr:
    arguments: list[nodes.Expr] = [nodes.Const(kind), nodes.Const(loop)]
    if name is not None:
        arguments.append(nodes.Name(name, "load"))
    call = nodes.Call(nodes.Name(WATCH, "load"), arguments, [], None, None)
    call.set_lineno(1)
    return call

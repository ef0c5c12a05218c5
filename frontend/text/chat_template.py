"""A model's chat template: messages in, prompt text out.

Checks what goes in (`chat_messages.py`) and runs the template in its sandbox
(`template_sandbox.py`). The text is what transformers' `apply_chat_template` would give for the
same messages; where transformers would fail on what APIs send, vLLM's conventions apply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from footplate.frontend.text.chat_messages import check_messages, plain
from footplate.protocol.errors import InvalidParameterError, InvalidRequestError

Message = Mapping[str, Any]

# Arguments of their own, here or in transformers: as template variables they would either replace
# what Footplate passes, or do nothing where the caller expects something.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)

# Ends the message to be continued, to be found again in the rendered text. Noncharacters are
# "permanently reserved for internal use" (Unicode 23.7): no text has a use for them. The space
# tells whether the template trims messages.
_CUT = "\ufdd2cut here\ufdd2 "


class ChatTemplate:
    """One Jinja chat template, compiled on first use and kept in a bounded cache.

    Args:
        source: the template.
        special_tokens: name to text (`bos_token` and so on), visible to the template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        # Imports jinja2: processes that never chat should not wait for it.
        from footplate.frontend.text.template_sandbox import compile_template

        self._source = source
        self._special_tokens = dict(special_tokens)
        self._compiled = compile_template(source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        rewrite: Callable[[Any], Any] | None = None,
    ) -> str:
        """Render a conversation.

        Args:
            messages: dicts with a role and a content; the content is a string or a list of
                `{"type": "text", "text": ...}` parts.
            add_generation_prompt: end with the header of the assistant's next message.
            tools: JSON schemas of functions the model may call.
            continue_final_message: leave the last message open, for the model to go on with.
            variables: further template variables, such as `enable_thinking`.
            rewrite: applied to messages, tools and variables after they were checked.

        Raises:
            InvalidParameterError: a variable has the name of something the template relies on.
            InvalidRequestError: the messages are malformed, or the template refused them.
        """
        variables = dict(variables or {})
        self._refuse_overrides(variables)
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message exclude each other: "
                "a new message begins, or the last one goes on"
            )
        given = {
            "documents": None,  # as in transformers, defined even when there are none
            **plain(variables, "chat_template_kwargs"),
            "messages": check_messages(
                messages,
                wants_parts=self._compiled.iterates_content,
                wraps_strings=self._compiled.iterates_content and not self._compiled.tests_content,
            ),
            "tools": _check_tools(tools),
        }
        if rewrite is not None:
            given = rewrite(given)
        final_text = _open_end(given["messages"][-1]) if continue_final_message else None
        text = self._compiled.render(
            {**self._special_tokens, **given, "add_generation_prompt": add_generation_prompt}
        )
        return text if final_text is None else _cut(text, final_text)

    def _refuse_overrides(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            if (
                name in _RESERVED
                or name in self._special_tokens
                or name in self._compiled.names
                or name.startswith("_")
            ):
                raise InvalidParameterError(
                    "chat_template_kwargs", name, "a name the chat template does not rely on"
                )


def _check_tools(tools: Sequence[Mapping[str, Any]] | None) -> Any:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise InvalidRequestError("tools: must be a list of JSON schemas")
    for n, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequestError(f"tools[{n}]: must be a JSON schema, that is, a dict")
    return plain(tools, "tools")


def _open_end(message: dict[str, Any]) -> str:
    """Mark the end of the message's text, in place, and return the text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CUT
        return content
    if content:
        text = str(content[-1]["text"])
        content[-1]["text"] = text + _CUT
        return text
    raise InvalidRequestError("continue_final_message: the last message has no text to continue")


def _cut(text: str, final_text: str) -> str:
    """Cut the rendered text where the final message's text ends."""
    end = text.rfind(_CUT.rstrip())
    if end < 0 or final_text.strip() not in text[:end]:
        raise InvalidRequestError(
            "continue_final_message: the chat template leaves out the last message, or changes it"
        )
    if text.startswith(_CUT, end):
        return text[:end]
    # The space behind the mark is gone: the template trims messages, so this one is trimmed too.
    return text[:end].rstrip()

"""Everything between token ids and characters, in the client process.

    tokenizer = load_tokenizer("models/demo")
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    detokenizer = tokenizer.detokenizer(prompt.token_ids)
    stop_strings = StopStrings(["\\n\\n"])
    text, stop = stop_strings.feed(detokenizer.feed(token_ids))

Imports neither torch nor transformers; `tokenizers` and jinja2 only when first used.
"""

from footplate.frontend.text.chat_template import Message
from footplate.frontend.text.detokenizer import Detokenizer
from footplate.frontend.text.model_folder import TokenizerFacts
from footplate.frontend.text.stop_strings import StopStrings
from footplate.frontend.text.tokenizer import ChatPrompt, Tokenizer, load_tokenizer

__all__ = [
    "ChatPrompt",
    "Detokenizer",
    "Message",
    "StopStrings",
    "Tokenizer",
    "TokenizerFacts",
    "load_tokenizer",
]

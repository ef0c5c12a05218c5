"""GBNF to Lark: what a grammar accepts is what llama.cpp's notation says."""

import time

import pytest

from footplate.frontend.gbnf import GbnfError, gbnf_to_lark, is_gbnf

from .test_structured import accepts

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
# Optional space
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (JSON, ['{"a": [1, -2.5e3, "x\\u00e9"], "b":null}', "{}"], ["{a}", "[1]", "{"]),
        (r'root ::= "\u0041" [\u0042-\u0044] "\x45" "\U0001F600"', ["ABE😀"], ["AEE😀"]),
        ("root ::= start\nstart ::= [a-z]+ Two\nTwo ::= two\ntwo ::= [0-9]{2}", ["ab12"], ["ab1"]),
        ('root ::= "a"\n  | "b"\n  | ("c"\n "d")', ["a", "b", "cd"], ["c"]),
        ("root ::= [^\\]a-c] [-x] [\\-] [x-]", ["d--x", "dx--"], ["a---", "]---"]),
        ('root ::= "x/y" [/] . "\\""', ['x/y/é"', 'x/y/\n"'], ["x/y/"]),
        ('root ::= a{2} a{1,} b{,2}x\na ::= "a"\nb ::= "b"', [], []),
        ('root ::= "a"{2} "b"{1,} "c"{0,1}', ["aab", "aabbc"], ["ab", "aabcc"]),
        ('root ::= word "x"\nword ::= [a-z]+', ["abx", "x" * 9], ["x", "ab"]),
        ('root ::= "(" root ")" | ', ["", "((()))"], ["(()"]),
        ('root ::= ""', [""], ["a"]),
    ],
)
def test_a_grammar_accepts_its_texts_and_no_others(
    grammar: str, good: list[str], bad: list[str]
) -> None:
    assert is_gbnf(grammar)
    if not good:
        with pytest.raises(GbnfError):
            gbnf_to_lark(grammar)
        return
    lark = gbnf_to_lark(grammar)
    assert [text for text in good if not accepts(lark, text)] == []
    assert [text for text in bad if accepts(lark, text)] == []


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ('expr ::= "a"', "no rule `root`"),
        ("root ::= nowhere", "`nowhere`"),
        ('root ::= "a"\nroot ::= "b"', "two rules"),
        ('root ::= ("a"', "not closed"),
        ('root ::= "a', "no part"),
        ("root ::= [a", "no part"),
        ("root ::= []", "empty"),
        ("root ::= *", "nothing to repeat"),
        ('root ::= "\\uD800"', "no character"),
        ("root ::= " + "(" * 100_000, "nested"),
        ('root ::= "a")', "begins with its name"),
    ],
)
def test_a_mistake_is_named(grammar: str, words: str) -> None:
    with pytest.raises(GbnfError, match=words):
        gbnf_to_lark(grammar)


@pytest.mark.parametrize("lark", ['start: "a::=b"', "start: A\nA: /x/", "", "start: a // ::="])
def test_lark_is_not_taken_for_gbnf(lark: str) -> None:
    assert not is_gbnf(lark)


def test_many_rules_take_linear_time() -> None:
    chain = "".join(f'a{i} ::= a{i + 1} "b" | "{i}"\n' for i in range(10_000))
    since = time.perf_counter()
    gbnf_to_lark(f'root ::= a0\n{chain}a10000 ::= "x"')
    assert time.perf_counter() - since < 5

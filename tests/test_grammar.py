"""Grammars: what is refused, and texts that follow them whatever is drafted."""

import pytest

from dspark_jax.engine.grammar import Grammar


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("yaml", "a"), "the grammar's kind is 'yaml': give one of"),
        ((["regex"], "a"), "the grammar's kind is"),
        (("regex", b"a"), "the grammar's text is b'a': give a text"),
        (("regex", ""), "the grammar's text is '' for regex: write one"),
        (("json_object", "{}"), "the grammar's text is '{}' for json_object: leave it out"),
        (("json_schema", "{"), "the schema is no JSON"),
        (("json_schema", "3"), "the schema is '3': give a JSON object"),
        (("json_schema", "[" * 10**5), "the schema is no JSON"),
        (("json_schema", {"type": "null"}), "the grammar's text is {'type': 'null'}: give a text"),
        (("lark", "\ud83d"), "the grammar's text has"),
    ],
)
def test_what_is_no_grammar_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Grammar(*fields)

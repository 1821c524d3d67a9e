"""Fifty prompts: questions, prose, code, lists, other scripts, long and short, some with the same beginning."""

from __future__ import annotations

_SHARED = (
    "You are a careful assistant who answers in full sentences, names what is uncertain, and never invents a source. "
    "The user has a background in engineering but not in the field that the question is about, so explain each term. "
)
_STORY = (
    "The lighthouse keeper wrote in his log every evening. On the first of March the wind came from the north and the "
    "sea was grey. On the second a ship passed far out and did not answer his lamp. On the third he found a bottle "
    "on the stones below the tower, and in the bottle a letter that was addressed to him. It was dated forty years "
    "before he was born. He read it twice, put it in his coat, and climbed the stairs more slowly than usual. "
)

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):\n",
    "Water boils at",
    "1, 2, 3, 5, 8, 13,",
    "Hello",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\ndef softmax(x):\n    ",
    "Photosynthesis is the process by which",
    "Q: What is the largest planet of the solar system?\nA:",
    "SELECT name, age FROM users WHERE",
    "Es war einmal ein König, der hatte",
    "La vie est belle parce que",
    "日本の首都は",
    "Ingredients:\n- 200 g flour\n- 3 eggs\n- a pinch of salt\n\nMethod:\n1.",
    "The derivative of x squared is",
    '{"name": "Ada", "born": 1815, "fields": [',
    "<html>\n<head><title>",
    "In 1969 the first people",
    "My favourite colour is blue because",
    "The three laws of thermodynamics are:",
    "Roses are red,",
    "if (ptr == NULL) {",
    "A man walks into a bar and",
    _SHARED + "Question: why is the sky blue?",
    _SHARED + "Question: how does a heat pump work?",
    _SHARED + "Question: what is a prime number?",
    _SHARED + "Question: why do cats purr?",
    _SHARED + "Question: what does a compiler do?",
    _SHARED + "Question: how deep is the ocean?",
    _STORY + "The next morning",
    _STORY + "The letter said:",
    _STORY + "Years later, his daughter",
    _STORY + _STORY + "The end of the log was",
    _SHARED + _STORY + "Summarize the story in one sentence.",
    "x" * 40,
    "the the the the the the the the",
    "0",
    " ",
    "\n\n\n",
    "Привет, как дела? Сегодня",
    "e = mc^2 means that",
    "To be, or not to be, that is",
    "Step 1: Open the box.\nStep 2: Take out the manual.\nStep 3:",
    "Monday, Tuesday, Wednesday,",
    "She said: \u201cI will not go there again,\u201d and",
    "The GPU has 132 streaming multiprocessors, each of which",
    "Breaking news: scientists have discovered",
    "🙂 means happy, 🙁 means",
]

"""Prompts of this project: texts that make a model repeat its input, and texts that do not."""

from __future__ import annotations

__all__ = ["CODE_EDIT", "FREE", "LONG_TEXTS", "RAG", "REPEATING", "SUMMARY"]

CODE_EDIT = [
    "Rename the variable `total` to `running_sum` in this code and print the whole function "
    "again:\n```python\ndef average(values):\n    total = 0.0\n    count = 0\n    for value in "
    "values:\n        total = total + value\n        count = count + 1\n    if count == 0:\n"
    "        return 0.0\n    return total / count\n```",
    "Add a docstring to this function and print it again without other changes:\n```python\n"
    "def find_longest_word(sentence):\n    words = sentence.split()\n    longest = ''\n"
    "    for word in words:\n        if len(word) > len(longest):\n            longest = word\n"
    "    return longest\n```",
    "Print this configuration again with the port changed to 9090:\n```\n[server]\nhost = "
    "127.0.0.1\nport = 8080\nworkers = 4\ntimeout = 30\n[logging]\nlevel = info\nfile = "
    "/var/log/server.log\nrotate = daily\n```",
    "Copy this list of cities exactly, one per line, three times: Lisbon, Porto, Braga, Coimbra, "
    "Faro, Evora, Aveiro, Viseu, Leiria, Setubal.",
]

SUMMARY = [
    "Summarise this text in its own words, sentence by sentence: The old lighthouse on the "
    "northern cape was built in 1884 by a crew of forty masons. The lighthouse keeper lived in a "
    "stone cottage beside the tower with his wife and three daughters. Every evening the keeper "
    "climbed the two hundred and twelve steps of the tower to light the great oil lamp. The lamp "
    "could be seen by ships from a distance of twenty miles. In 1931 the oil lamp was replaced by "
    "an electric lamp, and the last keeper left the stone cottage.",
    "Repeat the following minutes and add a title at the top: The committee met on Tuesday at nine "
    "in the morning. The treasurer reported that the membership fees for the year had been paid by "
    "sixty-one of the seventy members. The secretary read the minutes of the last meeting, which "
    "were approved. The committee decided to paint the boat house before the end of May. The next "
    "meeting of the committee will be held on the second Tuesday of June.",
]

RAG = [
    "Answer from the passage and quote the sentence that holds the answer.\nPassage: The river "
    "Aller rises in the hills east of Brandhof and flows for ninety kilometres to the sea. The "
    "river Aller is fed by three streams: the Lind, the Sorne and the Weissbach. The town of "
    "Brandhof takes its drinking water from the river Aller. In dry summers the town of Brandhof "
    "takes its drinking water from the Sorne reservoir.\nQuestion: Where does the town of Brandhof "
    "take its drinking water from in dry summers?",
    "Answer from the passage, then list all facts of the passage as bullet points.\nPassage: The "
    "model 7 kettle holds 1.7 litres and boils them in four minutes. The model 7 kettle has a "
    "filter that must be cleaned once a month. The model 9 kettle holds 2.2 litres and boils them "
    "in five minutes. The model 9 kettle has no filter.\nQuestion: Which kettle has a filter?",
]

REPEATING = [CODE_EDIT[0], SUMMARY[0], RAG[1], CODE_EDIT[2], *CODE_EDIT[1::2], SUMMARY[1], RAG[0]]

FREE = [
    "Tell me a short story about a fox who learns to sail.",
    "What should I think about before I buy a used bicycle?",
    "Explain to a child why the sky is dark at night.",
    "Write a letter to a friend about a rainy holiday.",
    "Describe a market in the morning.",
    "Give me five ideas for a school project about bees.",
    "Why do people like music from their youth?",
    "Write a dialogue between a teacher and a student about honesty.",
]

_PARAGRAPH = (
    "In the year {year} the town council of {town} decided to build a {thing} beside the river. "
    "The {thing} was planned by an engineer who had built a {other} in the neighbouring valley. "
    "Some people of {town} were against it, because they feared for the old {other}, but the "
    "{thing} was opened in the spring of the following year with music and speeches. "
)


def _long_text(seed: int, paragraphs: int) -> str:
    towns = ["Almen", "Brook", "Carden", "Dorne", "Eldham", "Farrow", "Gant", "Holt"]
    things = ["bridge", "mill", "school", "library", "market hall", "harbour", "mint", "bath"]
    parts = []
    for i in range(paragraphs):
        k = seed * 31 + i * 7
        parts.append(
            _PARAGRAPH.format(
                year=1700 + (k * 13) % 290,
                town=towns[k % 8],
                thing=things[(k // 2) % 8],
                other=things[(k // 3 + 3) % 8],
            )
        )
    return "".join(parts) + f"The history of {towns[seed % 8]} shows that"


LONG_TEXTS = [_long_text(seed, 12) for seed in range(6)]
"""Plain texts of some 800 tokens: longer than a sliding window of 512."""

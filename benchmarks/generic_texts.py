"""Makes `st_embfilter/model/generic_texts.json` again: the texts of `calibrate="generic"`.

SmolLM2-135M-Instruct (Apache-2.0) writes a text for each topic and form. What is unfinished, long,
short, repetitive or nearly a text that is there already is dropped; the order is shuffled, so that
the first N are mixed as well.

    python -m benchmarks.generic_texts [--model FOLDER_OR_GGUF] [--check DATA]

DATA is the folder of `benchmarks/results.py`: texts that share too much with an evaluation text are
shown then, and nothing is written. Without a model, that of `make models MODEL=smollm2` is taken.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from examples.models import MODELS, fetch
from st_embfilter.model.gguf_backbone import readable
from st_embfilter.unembedding.source import Source

FILE = Path(__file__).resolve().parents[1] / "st_embfilter" / "model" / "generic_texts.json"
COUNT = 1024
SEED = 0
SETTINGS: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 28}
BATCH = 128

#: Words in a row that are no phrase of everybody.
RUN = 8

FORMS = {
    "fact": "Write one short sentence that states a fact about {}.",
    "event": "Write one short sentence about something that happened yesterday with {}.",
    "question": "Write one short question about {}.",
    "problem": "Write one short message of a customer who has a problem with {}.",
    "request": "Write one short request that has to do with {}.",
    "opinion": "Write one short opinion about {}.",
    "title": "Write the title of an article about {}.",
    "advice": "Write one short piece of advice about {}.",
}

TOPICS = """
bread; coffee; vegetables; a restaurant; a recipe; hunger; farming; fishing; wine; chocolate; the
weather; a storm; snow; rivers; mountains; the sea; forests; deserts; earthquakes; the climate;
dogs; cats; horses; birds; insects; whales; flowers; trees; mushrooms; a garden; the heart; sleep;
headaches; vaccines; diabetes; a hospital; a dentist; pregnancy; exercise; glasses; children;
parents; grandparents; marriage; friendship; neighbours; a birthday; a funeral; love; anger;
school; university; an exam; teachers; homework; libraries; learning a language; museums; history;
poems; a novel; the cinema; theatre; a song; a guitar; an orchestra; dancing; painting;
photography; sculpture; football; tennis; swimming; running; chess; bicycles; climbing; the
Olympic Games; board games; video games; a train journey; airports; ships; cars; buses; road
works; traffic accidents; hotels; passports; maps; rent; a house; furniture; a kitchen; heating;
electricity; water pipes; cleaning; tools; paint; clothes; shoes; jewellery; hair; cosmetics;
toys; gifts; a supermarket; online shopping; a late delivery; wages; a job interview; meetings;
factories; small companies; unions; retirement; taxes; insurance; prices; banks; a lost wallet;
loans; the stock market; savings; computers; telephones; passwords; an email; a printer; a
website; a computer program; databases; spreadsheets; robots; artificial intelligence; batteries;
satellites; the moon; the sun; stars; physics; chemistry; mathematics; statistics; genes; cells;
fossils; an election; the government; laws; a trial; the police; prisons; war; peace; refugees;
borders; religion; philosophy; newspapers; television; advertising; rumours; a fire; recycling;
plastic; oil; steel
"""

#: SmolLM2's form of a chat, without the system message, up to the quotation mark of the answer.
PROMPT = '<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"'

PLAIN = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-"})
PREAMBLE = re.compile(r"^(sure|here|certainly|i'm sorry|as an ai|title:|article:)", re.IGNORECASE)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def grams(text: str, n: int = 3) -> set[tuple[str, ...]]:
    """Runs of n words; the whole text if it has fewer."""
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1))}


def overlap(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    """Jaccard index."""
    return len(one & other) / max(1, len(one | other))


def finished(answer: str) -> str | None:
    """What stands before the closing quotation mark, or whole sentences; None if it is unfit."""
    text, mark, _ = answer.translate(PLAIN).partition('"')
    text = " ".join(text.split("\n")[0].split())
    if not mark:
        text = text[: max(map(text.rfind, ".?!")) + 1]
    said = words(text)
    fit = (
        3 <= len(said) <= 28
        and text.isascii()
        and not PREAMBLE.match(text)
        and len(set(said)) > 0.6 * len(said)
    )
    return text if fit else None


def write_texts(path: str) -> Iterator[tuple[str, str | None]]:
    """Form and text of each prompt, in a shuffled order, again and again."""
    source, dtype = readable(Source.of(path), torch.float32, show_progress_bar=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(source.name, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(source.name, dtype=dtype).eval()
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    topics = [" ".join(topic.split()) for topic in TOPICS.split(";")]
    asked = list(product(topics, FORMS))
    random.Random(SEED).shuffle(asked)
    torch.manual_seed(SEED)
    asking = cycle(asked)
    while True:
        batch = list(islice(asking, BATCH))
        prompts = [PROMPT.format(FORMS[form].format(topic)) for topic, form in batch]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            written = model.generate(**inputs, do_sample=True, top_k=0, **SETTINGS)
        answers = written[:, inputs["input_ids"].shape[1] :]
        for (_, form), answer in zip(batch, answers, strict=True):
            yield form, finished(tokenizer.decode(answer, skip_special_tokens=True))


def make(path: str) -> dict[str, Any]:
    texts: list[str] = []
    known: list[set[tuple[str, ...]]] = []
    forms: dict[str, int] = dict.fromkeys(FORMS, 0)
    asked = dropped = 0
    for form, text in write_texts(path):
        asked += 1
        mine = grams(text or "")
        if text is None or any(overlap(mine, other) > 0.3 for other in known):
            dropped += 1
            continue
        texts.append(text)
        known.append(mine)
        forms[form] += 1
        print(f"{len(texts)} of {asked}: {text}", flush=True)
        if len(texts) == COUNT:
            break
    model = MODELS["smollm2"]
    made_by = {
        "model": model.title,
        "gguf_sha256": model.sha256,
        "licence": model.licence,
        "command": "python -m benchmarks.generic_texts",
        "seed": SEED,
        **SETTINGS,
        "dtype": "float32",
        "prompts": asked,
        "dropped": dropped,
        "forms": forms,
    }
    return {"made_by": made_by, "texts": texts}


# What must not be in it ---------------------------------------------------------------------------


def evaluation_texts(data: Path) -> Iterator[tuple[str, str]]:
    """Every text of the evaluation sets, as (set, text), training and development texts too."""
    for file in sorted(data.glob("*/*.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.reader(lines):
                yield from ((file.parent.name, cell) for cell in row[:2])
    for line in (data / "stackoverflow" / "titles.txt").read_text(encoding="utf-8").splitlines():
        yield "stackoverflow", line
    with gzip.open(data / "scifact" / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            yield from (("scifact", document[key]) for key in ("title", "text"))
    for line in (data / "scifact" / "queries.jsonl").read_text(encoding="utf-8").splitlines():
        yield "scifact", json.loads(line)["text"]


def shared(texts: Sequence[str], others: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """What an evaluation text shares with ours, as (set and how, text of ours and theirs).

    Equal are texts with the same words; near, those that share half of all their runs of three
    words; a run is eight words or more in a row, which are shown.
    """
    mine = [(text, words(text), grams(text), grams(text, RUN)) for text in texts]
    by_gram: dict[tuple[str, ...], list[int]] = {}
    for i, (_, _, triples, runs) in enumerate(mine):
        for gram in triples | runs:
            by_gram.setdefault(gram, []).append(i)
    for where, other in others:
        theirs, long = grams(other), grams(other, RUN)
        for i in {i for gram in theirs | long for i in by_gram.get(gram, ())}:
            text, said, triples, runs = mine[i]
            common = [" ".join(gram) for gram in runs & long if len(gram) == RUN]
            if said == words(other):
                yield f"{where}, equal", text
            elif overlap(triples, theirs) >= 0.5:
                yield f"{where}, near", f"{text} | {other}"
            elif common:
                yield f"{where}, run", f"{text} | {common[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--check", type=Path, metavar="DATA")
    options = parser.parse_args()
    if options.check is not None:
        texts = json.loads(FILE.read_text(encoding="utf-8"))["texts"]
        found = list(shared(texts, evaluation_texts(options.check)))
        for kind, text in found:
            print(f"{kind}: {text}")
        print(f"{len(texts)} texts; {Counter(kind for kind, _ in found) or 'nothing is shared'}")
        sys.exit(1 if found else 0)
    made = make(options.model or str(fetch("smollm2")))
    FILE.write_text(json.dumps(made, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the doctor of prepare.py found: a verdict on the data set, and a report as a dict and as text."""

import itertools
import json
import math
from collections import Counter, defaultdict

from parts.files import whole

NOT_WANTED = ("filtered out", "beyond the cap")  # reasons that come from the keys of a source
BY_CHOICE = (*NOT_WANTED, "too long", "too short", "too much text")  # reasons that are no fault of an utterance
LONG_SILENCE = 1.0  # seconds of silence at an end that the report mentions
MOST_OF_A_SET = 0.8  # share of the utterances of a language that makes their script the usual one


def judge(utterances, cfg, report_path):
    """Raise ValueError where too many utterances are at fault, all of a speaker are, or none is left; the file
    report_path then lists them."""
    judged = [u for u in utterances if u.reason not in BY_CHOICE]
    bad = [u for u in judged if u.reason]
    if len(bad) == len(judged):
        bad = [u for u in utterances if u.reason not in NOT_WANTED] or utterances
        problem = f"{len(bad)} of {len(bad)} utterances cannot be used"
        limit = "none is left"
    elif len(bad) > cfg.max_bad * len(judged):
        problem = f"{len(bad)} of {len(judged)} utterances cannot be used"
        limit = f"max_bad = {cfg.max_bad} allows fewer"
    elif cfg.max_bad < 1 and (lost := lost_speaker(utterances)):
        problem = f"speaker {lost[0].speaker!r:.60} is lost, all of {len(lost)} utterances cannot be used"
        limit = "leave the speaker out with a filter, or allow the loss with --max_bad=1"
        bad = lost
    else:
        return
    with whole(report_path, "w") as file:
        json.dump(report(utterances), file, indent=1, ensure_ascii=False)
    counts = ", ".join(f"{n} {reason}" for reason, n in Counter(u.reason for u in bad).most_common(4))
    example = f"for example {bad[0].id:.60}: {bad[0].reason} {bad[0].detail:.120}".rstrip()
    raise ValueError(f"{problem} ({counts}), {limit}; {example}; see {report_path}")


def lost_speaker(utterances):
    """The utterances of a speaker who has none left, because all that were wanted are at fault; else None."""
    of_speaker = defaultdict(list)
    for u in utterances:
        if u.reason not in NOT_WANTED:
            of_speaker[u.speaker].append(u)
    faulty = (us for us in of_speaker.values() if all(u.reason and u.reason not in BY_CHOICE for u in us))
    return next(faulty, None)


def report(utterances):
    """The findings as a dict: what is used, and each utterance that is not, with its reason."""
    used = [u for u in utterances if not u.reason]
    longest = max((u.seconds for u in used), default=1.0)
    widths = (m * 10.0**e for e in range(-2, 9) for m in (1, 2, 5))
    width = next(w for w in widths if longest / w <= 12)
    bins = Counter(int(u.seconds / width) for u in used)
    return {
        "utterances": len(utterances),
        "used": len(used),
        "hours": sum(u.seconds for u in used) / 3600,
        "speakers": shares(used, "speaker"),
        "languages": shares(used, "language"),
        "durations": [{"from": round(b * width, 2), "to": round((b + 1) * width, 2), "utterances": bins[b]}
                      for b in range(min(bins, default=0), max(bins, default=-1) + 1)],
        "reasons": dict(Counter(u.reason for u in utterances if u.reason).most_common()),
        "silent_ends": sum(u.silence > LONG_SILENCE for u in used),
        "other_script": [{k: getattr(u, k) for k in ("id", "script", "text")} for u in strangers(used)],
        "not_used": [{k: getattr(u, k) for k in ("id", "source", "reason", "detail")} for u in utterances if u.reason],
    }  # fmt: skip


def shares(used, what):
    """{name: {"utterances", "hours"}} of the speakers or the languages, the one with the most hours first."""
    found = defaultdict(lambda: {"utterances": 0, "hours": 0.0})
    for u in used:
        found[getattr(u, what)]["utterances"] += 1
        found[getattr(u, what)]["hours"] += u.seconds / 3600
    return dict(sorted(found.items(), key=lambda s: (-s[1]["hours"], s[0])))


def strangers(used):
    """The utterances in another script than most of their language, where they are few: perhaps transliterations."""
    scripts = defaultdict(Counter)
    for u in used:
        scripts[u.language][u.script] += bool(u.script)
    usual = {language: counts.most_common(1)[0] for language, counts in scripts.items()}
    few = {language for language, (_, n) in usual.items() if n >= MOST_OF_A_SET * scripts[language].total()}
    return [u for u in used if u.language in few and u.script not in ("", usual[u.language][0])]


def show(findings):
    """The findings as a page of text."""
    durations, speakers = findings["durations"], findings["speakers"]
    lines = [f"\n{findings['used']:,} of {findings['utterances']:,} utterances are used, {findings['hours']:.2f} hours"]
    if findings["reasons"]:
        examples = defaultdict(list)
        for x in findings["not_used"]:
            examples[x["reason"]].append(f"{x['id']} {x['detail']}".rstrip())
        lines += table("not used", "  for example", [
            (reason, n, f"  {', '.join(examples[reason][:3]):.80}") for reason, n in findings["reasons"].items()
        ])  # fmt: skip
    if findings["silent_ends"]:
        some = f"{findings['silent_ends']:,} utterances have more than {LONG_SILENCE:g} s of silence at an end"
        lines.append(f"\n  {some}; --trim_silence=0.3 would leave 0.3 s")
    if others := findings["other_script"]:
        some = ", ".join(f"{x['id']} {x['text']!r:.30}" for x in others[:3])
        lines.append(f"\n  {len(others):,} utterances are in another script than the rest "
                     f"({', '.join(sorted({x['script'].lower() for x in others}))}), for example {some}")  # fmt: skip
    most = max(b["utterances"] for b in durations)
    lines += table("duration", "", [
        (f"{b['from']:g} to {b['to']:g} s", b["utterances"], f"  {'#' * math.ceil(40 * b['utterances'] / most)}")
        for b in durations
    ])  # fmt: skip
    lines += table("speaker", "     hours", [
        (name, s["utterances"], f"{s['hours']:10.2f}") for name, s in itertools.islice(speakers.items(), 20)
    ])  # fmt: skip
    if len(speakers) > 20:
        lines.append(f"  and {len(speakers) - 20:,} more")
    if len(languages := findings["languages"]) > 1:
        lines += table("language", "     hours", [
            (name or "not named", n["utterances"], f"{n['hours']:10.2f}") for name, n in languages.items()
        ])  # fmt: skip
    return "\n".join(lines)


def table(name, more, rows):
    """A heading and rows (name, number of utterances, further columns) as lines of text."""
    return [f"\n  {name:20}utterances{more}", *(f"  {name:20.20}{n:10,}{rest}" for name, n, rest in rows)]


def show_cost(cfg, meta, cost, size):
    """What was written, `size` MB, and what an epoch of it costs, as text. meta: the meta.json of the token folder."""
    codec = meta["codec"]
    pieces = meta["tokenizer"]["vocab_size"]
    bits = codec["n_codebooks"] * math.log2(codec["codebook_size"]) * codec["frame_rate"]
    fewer = ", all that the texts support" if not cfg.tokenizer and pieces < cfg.vocab_size else ""
    return "\n".join([
        *table("split", "    frames   text tokens", [
            (split, n["utterances"], f"{n['frames']:10,}{n['text_tokens']:14,}") for split, n in meta["splits"].items()
        ]),
        f"\n  codec      {codec['name']}: {codec['n_codebooks']} codebooks of {codec['codebook_size']}, "
        f"{codec['frame_rate']:g} frames/s, {bits:,.0f} bit/s",
        f"  tokenizer  {pieces:,} pieces{fewer}",
        f"  an epoch   {cost['rows']:,} rows (frames and text tokens), about {cost['steps']:,} batches of max_tokens = "
        f"{cost['max_tokens']:,}",
        f"  disk       {size:.1f} MB in {cfg.data_dir}",
    ])  # fmt: skip

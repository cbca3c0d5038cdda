"""What is one token for the Penn Treebank tokenizer of CoreNLP 3.4.1: the rules, in falling precedence.

Two tokenizers that differ in one rule give different BLEU and CIDEr-D figures, so the rules below have the behaviour of
that one release, oddities included (`oddity` in a comment). Syntax of a pattern: `scanner.py`; what an action does:
`ptb_tokenizer.py`.
"""

from functools import cache

from vlmoe.metrics.ptb_characters import is_digit, is_letter, is_mark, is_symbol, is_uppercase
from vlmoe.metrics.scanner import Rule, Scanner

_SETS = {"letter": is_letter, "digit": is_digit, "mark": is_mark, "symbol": is_symbol, "uppercase": is_uppercase}


def _any(words: str) -> str:
    """One of `words`, in any case."""
    return "(" + "|".join(words.split()) + ")"


def _any_capitalized(words: str) -> str:
    """One of `words`, with a capital at least in front: in small letters they are everyday words."""
    return _any(" ".join(f"[{word[0]}]{word[1:]}" for word in words.split()))


_NAME = "[A-Za-z][\\-.:A-Za-z_0-9]*"  # of a tag or an attribute
_NO_ADDRESS = ' \t\n\f\r"<>|'  # characters that end an address of any kind
_SENTENCE_MARKS = ".!?(){},"
_UPRIGHT = "'\u0092\u2019"  # apostrophes; the second is Windows' in a control character's place
_DASH_OR_SPACE = "[\\- \u00a0]"
_EYES = "\\^x=~<>"
_ACRONYM_OF_COUNTRY = "(Canada|EU|Japan|Korean|non|Sino)-U\\.S|U\\.S\\.-U\\.(K|S\\.S\\.R)"

# A full stop after these ends the sentence too if a capital, a tag or two blanks follow, or next to nothing.
_SHORT_BEFORE_SMALL = _any(
    "ala al ariz assn bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak ed\\.d esq est etc ext fla ga "
    "inc ind intl jr kan kans ky ltd md mich minn mo mont neb nev okla penn ph\\.d plc pp?t[ey]s? rd rt seq sq sr "
    "sys tel tenn univ va vt wis wisc wyo jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu "
    "thurs fri"
)
_SHORT_WORDS_BEFORE_SMALL = _any_capitalized("Ark Az Del Ill La Mass Miss Ore Pa Tex Wash")
# A full stop after these ends no sentence.
_SHORT_BEFORE_CAPITAL = _any(
    "a\\.k\\.a adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec "
    "ens ft gen gov govs hon insp invt jos lieut lt m[ft]g maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres "
    "prof profs pvt rep reps rev sen sens sfc sgt spc st ste supt supts treas vs wm [M]iss [v]"
)
_SHORT_BEFORE_NUMBER = _any("art bldg ca fig figs no nos op pp prop")
_SENTENCE_STARTS = _any_capitalized(
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr\\. "
    "Ms\\. Now Once One Other Our She Since So Some Such That The Their Then There These They This We What When "
    "While Yet You"
)
_FILE_ENDINGS = _any(
    "bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py "
    "sql tar txt wav x xml zip"
)

_DEFINITIONS = {
    # characters
    "space": "[ \t\u00a0\u2000-\u200a\u3000]",
    "newline": "\r?\n|[\r\u000b\u000c\u0085\u2028\u2029]",
    "gap": "{space}|{newline}",
    "alnum": "{letter}|{digit}",
    "ascii": "[0-9A-Za-z]",
    "in_word": "{letter}|{mark}|&[AEIOUaeiou](acute|grave|uml);",
    "apostrophe": f"[{_UPRIGHT}]|&apos;",
    "any_apostrophe": f"[{_UPRIGHT}`\u0091\u2018\u201b]|&apos;",
    "hyphen": "[_\\-\u058a\u2010\u2011]",
    "comma": "[,:;\u3001]",
    # words; what follows an inner . ! or ? without a space belongs to the word
    "word": "{in_word}({in_word}|{digit}|[.!?]{in_word})*",
    "clitic": "{apostrophe}([DMSdms]|ll|re|ve)",
    "not": "n{any_apostrophe}t",
    "stem_of_not": "[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*",
    "name_part": "([DLOdlo]{any_apostrophe}{alnum})?{alnum}+",  # d'Avignon, o'clock
    "thing": "{name_part}({hyphen}{name_part})*",
    "letters_joined": "[A-Z]+(([&+]|&amp;)[A-Z]+)+",  # AT&T
    "slash_part": "{ascii}+(-[A-Za-z]+){0,2}",
    "hyphenated": "{ascii}[,.0-9A-Za-z\u00ad]*(-([0-9A-Za-z\u00ad]+|{dotted}\\.))+",
    "dotted": f"([A-Za-z](\\.[A-Za-z])+|{_ACRONYM_OF_COUNTRY})",
    "acronym": "[A-Za-z]|{dotted}",
    "ends_sentence_or_not": f"({_SHORT_BEFORE_SMALL}|{_SHORT_WORDS_BEFORE_SMALL})\\.",
    "tag": f"<([!?][\\-A-Za-z][^>\r\n]*|{_NAME}( +{_NAME}( *= *('[^']*'|\"[^\"]*\"))?)* */?|/{_NAME}) *>",
    # numbers
    "number": "[+\\-]?({digit}+|{digit}*([,.:\u00ad\u066b\u066c]{digit}+)+)",
    "up_to_4": "{digit}{1,4}",
    "local_number": f"[0-9]{{3,4}}{_DASH_OR_SPACE}?[0-9]{{3,5}}",
    "area": "[0-9]{2,4}",
    # addresses
    "url_path": f"[^{_NO_ADDRESS}()]+[^{_NO_ADDRESS}{_SENTENCE_MARKS}\\-]",
    # oddity: the range from , to _ shuts out digits and capitals
    "domain": f"[^{_NO_ADDRESS}`'{_SENTENCE_MARKS}$,-_]+\\.",
    "mail_part": f"[^{_NO_ADDRESS}(){{}}.\u00a0]+",
    # faces; oddity: a lone bracket in one of them reaches for the next <
    "nose": f"[{_EYES}'\\-]",
    "eastern_face": (
        f"[{_EYES}]\\.\\[\\^x=[^<]*<>\\]|{{nose}}_{{nose}}|\\({{nose}}[._]?{{nose}}\\)|\\([{_EYES}']-[{_EYES}'`]\\)"
    ),
}

_RULES = [
    Rule("(c|f)#|c\\+\\+", "plain"),
    Rule("cannot|'twas", "split_last_3"),
    Rule("gimme|gonna|gotta|lemme|wanna|'tis", "split_last_2"),
    # mark-up
    Rule("{tag}", "spaced"),
    Rule("&(md|mdash|ndash);|[\u0096\u0097\u2013-\u2015]", "dash"),
    Rule("&amp;", "ampersand"),
    Rule("&(cdq|ht|lr|odq|qc|ql|qr|tl|ur|#[0-9]+);", "plain"),
    # words
    Rule("{word}", "soft", "{clitic}"),
    Rule("{stem_of_not}", "soft", "{not}"),
    Rule("{word}", "soft"),
    Rule("{apostrophe}(n|n{apostrophe}|em|til|till|cause|[2-9]0s)", "plain"),
    Rule("([DJLdjl]|dunkin|ol|somethin){apostrophe}", "plain"),
    Rule("[A-HJ-XZn]{any_apostrophe}{letter}{letter}+", "plain"),
    Rule("{letter}+[AEIOUYaeiouy]{any_apostrophe}[A-Zaeiou]{letter}*", "plain"),
    Rule("c'mon|cont'd\\.?|e'er|ev'ry|li'l|nat'l|nor'easter|o{any_apostrophe}o|s'mores", "plain"),
    Rule("y{apostrophe}", "plain", "{letter}"),
    # addresses
    Rule(f"https?://[^{_NO_ADDRESS}(){{}}]+[^{_NO_ADDRESS}{_SENTENCE_MARKS}\\-]", "plain"),
    Rule(
        f"(www\\.([^{_NO_ADDRESS}{_SENTENCE_MARKS}]+\\.)+[A-Za-z]{{2,4}}|{{domain}}+(com|edu|net|org))(/{{url_path}})?",
        "plain",
    ),
    Rule(f"(<|&lt;)?{{ascii}}[^{_NO_ADDRESS}(){{}}\u00a0]*@({{mail_part}}\\.)*{{mail_part}}(>|&gt;)?", "plain"),
    Rule("@[A-Za-z_][0-9A-Za-z_]*|#{in_word}+", "plain"),
    # what an apostrophe joins to the word before
    Rule("{clitic}|{not}", "quote_right", "[^A-Za-z]"),
    Rule("{not}", "quote_right"),
    # numbers
    Rule("{digit}{1,2}[/\\-]{digit}{1,2}[/\\-]{digit}{2,4}", "plain"),
    Rule("{number}", "soft"),
    Rule("[\u207a\u207b\u208a\u208b]?([\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+|[\u2080-\u2089]+)", "plain"),
    Rule("({up_to_4}[\\- \u00a0])?{up_to_4}(/|\\\\/|\u2044){up_to_4}", "spaced"),
    Rule("[\u00bc-\u00be\u2153-\u215e]", "fraction"),
    Rule("-(lcb|lrb|lsb|rcb|rrb|rsb)-|anti-|pro-|c\\.d\\.s", "ampersand"),
    Rule("S(&|&amp;)(Ls|P-500)|cap{apostrophe}n|c{apostrophe}est", "ampersand"),
    Rule("{slash_part}(\\\\?/{slash_part}){1,2}", "plain"),
    Rule("[A-Z]*\\$|#", "plain"),
    Rule("[\u0080\u00a2-\u00a5\u060b\u0e3f\u20a0\u20a4\u20ac\uffe0\uffe1\uffe5\uffe6]", "currency"),
    # abbreviations
    Rule("({acronym})\\.", "acronym", f"({{gap}})+({_SENTENCE_STARTS}|{{tag}})({{gap}})"),
    Rule(f"{_SHORT_BEFORE_NUMBER}\\.", "plain", "({gap})?{digit}"),
    Rule("(co|pt[EYey])\\.", "plain", "{space}(ltd|lim)"),
    Rule("{ends_sentence_or_not}", "repeat_period", "({gap})({gap}|{uppercase}|{tag})"),
    Rule("{ends_sentence_or_not}", "plain", "[^][^]"),
    Rule("{ends_sentence_or_not}", "repeat_period"),
    Rule(f"({_SHORT_BEFORE_CAPITAL}|{{acronym}})\\.", "plain"),
    Rule(f"{_SHORT_BEFORE_CAPITAL}|{{acronym}}", "plain", "{space}"),
    Rule("{acronym}|{apostrophe}[0-9][0-9]", "plain", "{gap}"),
    Rule(f"({{in_word}}|{{digit}})+(\\.({{in_word}}|{{digit}})+)*\\.{_FILE_ENDINGS}", "plain", "{gap}|[!,.?]"),
    Rule("{word}\\.", "soft", "{comma}"),
    Rule(f"(\\([0-9]{{2,3}}\\)[ \u00a0]?|(\\+\\+?)?({{area}}{_DASH_OR_SPACE}){{1,2}}){{local_number}}", "phone"),
    Rule("((\\+\\+?)?{area}\\.)?{area}\\.[0-9]{3,4}\\.[0-9]{3,5}", "phone"),
    # marks
    Rule('"|&quot;', "quote_left", "[$0-9A-Za-z]"),
    Rule('"|&quot;', "quote_right"),
    Rule("<|&lt;", "less"),
    Rule(">|&gt;", "greater"),
    Rule("[<>]?[:;=][\\-*'o]?[()@DOPdp\\[\\]\\\\{|]", "face", "[^0-9A-Za-z]"),
    Rule("{eastern_face}", "face"),
    Rule("[()\\[\\]{}]", "bracket"),
    Rule("-+", "hyphens"),
    Rule("\\.{3,5}|(\\.[ \u00a0]){2,4}\\.|[\u0085\u2026]", "ellipsis"),
    Rule("@+|#+|_+|\\*+|(\\\\\\*){1,3}|[!?]+|{comma}|[./=]", "plain"),
    # more words
    Rule("{hyphenated}\\.", "soft", "{comma}"),
    Rule("{hyphenated}", "soft"),
    Rule("{thing}\\.", "plain", "{comma}"),
    Rule("{thing}", "plain"),
    Rule("{letters_joined}\\.", "ampersand", "{comma}"),
    Rule("{letters_joined}", "ampersand"),
    # more marks
    Rule("'", "quote_left", "[A-Za-z][^ \t\r\n\u00a0]"),
    Rule("{clitic}|{apostrophe}|''", "quote_right"),
    Rule("[\u0091-\u0094`\u2018-\u201f\u2039\u203a\u00ab\u00bb]{1,2}", "quote_right"),
    Rule("<<|>>|[%&+\\\\^|~]|{symbol}", "plain"),
    # what leaves no token
    Rule("[\u0000\u007f\u200b\u200e\u200f\ufeff]|{space}+|&nbsp;", "drop"),
    Rule("{newline}", "newline"),
]


@cache
def scanner() -> Scanner:
    """One for all callers: it keeps the states that it has met."""
    return Scanner(_RULES, _DEFINITIONS, _SETS)

"""Some 1,500 basic English words by part of speech, as TinyStories draws them (2305.07759, section 2)."""

from functools import cache
from importlib.resources import files

# The lists of words.txt that are of a part of speech; the simulator's sentences want nouns and verbs of certain kinds.
NOUNS = ("animal", "person", "food", "thing", "nature", "noun")
VERBS = ("action", "verb")
ADJECTIVES = ("adjective",)
OBJECTS = ("food", "thing", "nature")  # that one can find and hold
ACTIONS = ("action",)  # verbs that need no object


@cache
def words(*lists: str) -> tuple[str, ...]:
    """The words of some lists, sorted."""
    return tuple(sorted({word for name in lists for word in _lists()[name]}))


@cache
def _lists() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    name = ""
    for line in files("phi_train.synthesize").joinpath("words.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name = line.strip("[]")
            found[name] = []
        elif line and not line.startswith("#"):
            found[name] += line.split()
    return found


def forms(word: str) -> set[str]:
    """A word and what regular inflection makes of it: plays, played, playing; hurried; bigger."""
    stems = {word}
    if word.endswith("e"):
        stems.add(word[:-1])
    if len(word) > 2 and word[-1] not in "aeiouwxy" and word[-2] in "aeiou" and word[-3] not in "aeiou":
        stems.add(word + word[-1])
    if word.endswith("y") and word[-2] not in "aeiou":
        stems.add(word[:-1] + "i")
    endings = ("s", "es", "ed", "d", "ing", "er", "est", "ly", "r", "st")
    return {word} | set(_IRREGULAR.get(word, word).split()) | {stem + ending for stem in stems for ending in endings}


_IRREGULAR = {
    line.split()[0]: line
    for line in """arise arose arisen
awaken awoke
bear bore born
beat beaten
become became
begin began begun
bite bit bitten
break broke broken
bring brought
build built
burst burst
buy bought
catch caught
child children
choose chose chosen
come came
creep crept
cut cut
deal dealt
dig dug
draw drew drawn
dream dreamt
drink drank drunk
drive drove driven
eat ate eaten
fall fell fallen
feed fed
feel felt
find found
flee fled
fly flew flown
foot feet
forget forgot forgotten
forgive forgave forgiven
freeze froze frozen
get got gotten
give gave given
goose geese
grow grew grown
hang hung
have had has
hear heard
hide hid hidden
hit hit
hold held
hurt hurt
keep kept
kneel knelt
know knew known
lay laid
lead led
leap leapt
leave left
lend lent
let let
lie lay lain lying
lose lost
make made
mean meant
meet met
mouse mice
pay paid
put put
quit quit
read read
ride rode ridden
ring rang rung
rise rose risen
run ran
say said
see saw seen
seek sought
sell sold
send sent
set set
shake shook shaken
shine shone
show shown
shut shut
sing sang sung
sink sank sunk
sit sat
sleep slept
slide slid
speak spoke spoken
spend spent
spin spun
spread spread
stand stood
steal stole stolen
swallow swallowed
sweep swept
swell swollen
swim swam swum
swing swung
take took taken
teach taught
tear tore torn
tell told
think thought
throw threw thrown
tie tying
tooth teeth
understand understood
wake woke woken
wear wore worn
weave wove woven
weep wept
win won
wring wrung
write wrote written
good better best
bad worse worst""".splitlines()
}

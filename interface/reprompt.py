"""Music examples for calibration, and the caption form in which prompts reach the deployed model.

A user types a short request; the deployed prompt is a longer caption with genre, instruments, rhythm, mood, tempo, key
and length, in this order and under fixed labels. FP8 activation scales must be measured on captions of that form, so
`build/make_calib.py` takes its prompts from here. All examples were written for this project and name no artist. Uses
only the standard library, so that the module loads before anything is installed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MusicExample:
    """One piece of music: a short request, and the facts of its deployed caption.

    `request` is what a user might type; it is not part of the caption. `bpm` is beats per minute; for music without a
    steady pulse, the pace of its phrases. `key` is free text ("A minor", "no fixed key"). `seconds` is the length of
    the piece. All text is printable ASCII, and only `rhythm` may contain commas.
    """

    request: str
    genre: str
    instruments: tuple[str, ...]
    rhythm: str
    mood: tuple[str, ...]
    bpm: int
    key: str
    seconds: float


# Field order: request, genre, instruments, rhythm, mood, bpm, key, seconds.
# The list order matters: neighbours differ in style, tempo and text length, so that any prefix is a varied set. A new
# example goes where its neighbours differ from it. No text is long enough to be cut at the model's 256 tokens.
# fmt: off
MUSIC_EXAMPLES: tuple[MusicExample, ...] = (
    MusicExample("warm deep house for a late set", "deep house",
        ("electric piano", "round sub bass", "drum machine", "filtered pad"),
        "four-on-the-floor kick with offbeat open hats and a shuffled shaker", ("warm", "nocturnal"),
        122, "A minor", 54.0),
    MusicExample("huge trailer music that builds and builds", "epic film score",
        ("full string section", "eight french horns", "low brass", "taiko ensemble", "wordless choir",
         "anvil hits", "deep synth braams", "tubular bells"),
        "a slow ostinato in the low strings that gains a new layer every eight bars, with accents on one and the "
        "last eighth of the bar, a two-bar silence before the climax, then massed drums in driving triplets "
        "under the full theme and a final unison hit that rings out in a large hall",
        ("heroic", "ominous at first", "triumphant at the end", "vast"), 84, "D minor", 150.0),
    MusicExample("slow piano", "solo piano", ("felt piano",), "rubato", ("tender",), 58, "F major", 40.0),
    MusicExample("fast thrash with a half-time breakdown", "thrash metal",
        ("two palm-muted electric guitars", "picked bass guitar", "double-kick drum kit", "squealing lead guitar"),
        "galloping sixteenth notes over a skank beat, dropping to half time for the breakdown",
        ("aggressive", "relentless", "defiant"), 190, "E minor", 75.0),
    MusicExample("drone", "drone ambient", ("sine tones",), "no beat", ("still",), 40, "C", 180.0),
    MusicExample("dusty beat to study to", "lo-fi hip hop",
        ("sampled jazz guitar", "muffled kick and snare", "vinyl crackle", "upright bass"),
        "lazy swung boom-bap, snare a little late", ("mellow", "hazy"), 76, "E flat major", 60.0),
    MusicExample("street carnival drums", "samba batucada",
        ("surdo", "repinique", "caixa", "tamborim", "agogo bells", "cuica", "whistle"),
        "tight sixteenth-note samba with call and response between the repinique and the whole bateria, full "
        "stops and shouted restarts", ("jubilant", "sweaty"), 138, "no fixed key", 45.0),
    MusicExample("smoky quintet jazz with room for everyone to solo", "hard bop jazz",
        ("trumpet with a straight mute", "tenor saxophone", "grand piano", "walking double bass",
         "drum kit with a dark ride cymbal"),
        "medium-up swing in four, head played twice in tight unison, tenor and trumpet trade choruses then fours "
        "with the drums, the pianist comping sparsely behind them, and a tag of three with a held last chord",
        ("cool", "confident", "smoky", "playful"), 168, "B flat minor", 120.0),
    MusicExample("campfire fingerpicking", "folk",
        ("steel-string acoustic guitar", "quiet harmonica"),
        "steady alternating-thumb fingerpicking", ("homely", "wistful"), 96, "G major", 35.0),
    MusicExample("acid techno, raw", "acid techno", ("squelching bass synthesizer", "drum machine"),
        "straight kick, rolling 16ths", ("hypnotic",), 136, "A minor", 90.0),
    MusicExample("string quartet, slow movement", "chamber music",
        ("first violin", "second violin", "viola", "cello"),
        "long bowed lines in three, with sighing appoggiaturas handed down from violin to cello and a "
        "pizzicato middle section", ("elegiac", "intimate", "dignified"), 52, "C sharp minor", 110.0),
    MusicExample("bouncy video game level", "chiptune", ("pulse-wave lead", "triangle-wave bass", "noise drums"),
        "snappy eighth-note hops", ("cheeky", "bright"), 160, "C major", 20.0),
    MusicExample("classic reggae, sunny", "roots reggae",
        ("skanking electric guitar", "bubbling organ", "deep bass guitar", "one-drop drum kit", "melodica",
         "tape echo"),
        "one-drop with the kick and rimshot together on three, guitar chops on the offbeats and long dub echoes "
        "thrown on the last snare of each phrase", ("sunny", "unhurried", "hopeful"), 74, "G minor", 95.0),
    MusicExample("hard trap beat", "trap", ("808 bass", "rapid hi-hats", "dark bell loop"),
        "half-time, rolling triplet hats", ("menacing", "cold"), 142, "F sharp minor", 30.0),
    MusicExample("sitar at dawn", "hindustani classical",
        ("sitar", "tanpura drone", "tabla"),
        "free alap without meter, then a slow sixteen-beat tintal cycle as the tabla enters, growing denser until "
        "a closing tihai", ("devotional", "serene", "searching"), 62, "C sharp with a raised fourth", 140.0),
    MusicExample("garage rock, loud and short", "garage rock",
        ("fuzz guitar", "bass guitar", "trashy drum kit"), "pounding straight eighths", ("rowdy",),
        172, "A major", 15.0),
    MusicExample("floating pads for meditation", "space ambient",
        ("granular choir pad", "slow analog strings", "glass-like bell tones", "distant wind texture",
         "sub drone"),
        "no percussion; chords swell over sixteen seconds and overlap, with a single bell every few breaths",
        ("weightless", "calm", "awe-struck"), 48, "D lydian", 175.0),
    MusicExample("fast acoustic swing with violin", "string swing",
        ("two rhythm acoustic guitars", "lead acoustic guitar", "violin", "double bass"),
        "percussive two-and-four guitar strokes under fast arpeggios", ("sprightly", "charming"),
        182, "D minor", 50.0),
    MusicExample("solo cello", "solo cello", ("cello",), "flowing eighths", ("grave", "noble"), 66, "G major", 55.0),
    MusicExample("liquid drum and bass with a soulful feel", "liquid drum and bass",
        ("chopped breakbeat", "reese bass", "rhodes chords", "airy vocal chops", "rising noise sweeps",
         "plucked harp sample"),
        "syncopated two-step break at full tempo with ghost notes between the snares, bass in half time, an "
        "eight-bar drop-out to chords alone and then the full drums again", ("soulful", "uplifting", "fluid"),
        174, "F minor", 85.0),
    MusicExample("sad country ballad", "country ballad",
        ("pedal steel guitar", "acoustic guitar", "brushed snare", "upright bass"),
        "slow waltz with brushes", ("heartbroken", "dusty"), 72, "D major", 48.0),
    MusicExample("spooky short sting", "horror film score", ("scraped cymbals", "string clusters"),
        "sudden swells, no pulse", ("dread",), 44, "atonal", 10.0),
    MusicExample("afrobeat band with horns, long groove", "afrobeat",
        ("baritone saxophone", "two trumpets", "tenor guitar", "rhythm guitar", "electric organ",
         "bass guitar", "drum kit", "shekere", "congas", "clave"),
        "interlocking polyrhythm that never resolves: clave on top, a rolling tom pattern under it, guitars in "
        "hocketing single-note lines, a repeating two-bar bass figure, horn riffs that answer the organ solo "
        "and sharp unison breaks every thirty-two bars",
        ("defiant", "ecstatic", "tireless", "communal"), 112, "G dorian", 165.0),
    MusicExample("dreamy shoegaze wall", "shoegaze",
        ("layered tremolo-arm guitars", "buried bass guitar", "washed-out drums"),
        "steady backbeat behind a wall of reverb", ("dreamy", "blurred", "longing"), 104, "E major", 70.0),
    MusicExample("music box", "lullaby", ("music box",), "gentle 3/4", ("sleepy",), 80, "C major", 18.0),
    MusicExample("taiko only", "taiko drumming",
        ("o-daiko", "shime-daiko", "nagado-daiko", "hand cymbals"),
        "swinging ji pattern on the small drums, thunderous unison strokes on the large one, a long accelerating "
        "roll and a dead stop", ("ceremonial", "fierce"), 126, "no fixed key", 65.0),
    MusicExample("synthwave night drive", "synthwave",
        ("arpeggiated analog bass", "gated-reverb snare", "bright brass synthesizer", "neon lead"),
        "driving eighth-note bass with a big backbeat", ("nostalgic", "sleek"), 108, "B minor", 58.0),
    MusicExample("slow blues guitar", "electric blues",
        ("overdriven hollow-body guitar", "hammond organ", "bass guitar", "drum kit"),
        "slow twelve-eight shuffle over twelve bars with a stop-time turnaround", ("aching", "gritty"),
        60, "A minor pentatonic", 88.0),
    MusicExample("bossa", "bossa nova", ("nylon guitar", "soft shaker"), "gentle bossa clave", ("breezy",),
        130, "D major", 25.0),
    MusicExample("orchestral ballet dance, light and witty", "romantic ballet orchestra",
        ("staccato woodwinds", "celesta", "pizzicato strings", "harp", "triangle", "muted horns",
         "solo bassoon"),
        "nimble two-in-a-bar dance with teasing pauses; flute and clarinet pass the tune in quick grace notes, "
        "the bassoon answers a beat late, and the whole orchestra joins for an eight-bar gallop before it "
        "vanishes on a single plucked note", ("witty", "sparkling", "graceful", "mischievous"),
        118, "E flat major", 100.0),
    MusicExample("glitchy idm", "experimental electronica",
        ("clicks and cuts", "detuned music-box synth", "bitcrushed drums", "fm bass"),
        "fractured breaks that stutter across seven-eight bars", ("nervous", "curious"), 147, "F lydian", 62.0),
    MusicExample("funeral doom, very slow", "doom metal",
        ("down-tuned guitars", "distorted bass guitar", "sparse drum kit", "pipe organ"),
        "crushing whole notes with a tolling ride bell", ("desolate", "monumental"), 46, "B minor", 160.0),
    MusicExample("tango for two", "tango", ("bandoneon", "violin", "piano", "double bass"),
        "marcato in four with sharp syncopated accents and sudden rubato", ("dramatic", "sensual"),
        116, "G minor", 68.0),
    MusicExample("old school rap beat", "boom bap", ("breakbeat", "horn stab", "scratches"), "hard swung break",
        ("cocky",), 92, "C minor", 28.0),
    MusicExample("solo flute in a cave, improvised", "new age",
        ("bamboo flute", "water drops", "frame drum played with the fingertips"),
        "unmetered phrases with long rests filled by natural echo; the drum marks only the start of each breath",
        ("solitary", "ancient", "peaceful"), 50, "A minor pentatonic", 130.0),
    MusicExample("happy ukulele ad", "indie pop",
        ("ukulele", "hand claps", "glockenspiel", "whistling"), "bouncy island strum with claps on two and four",
        ("carefree", "sunny"), 128, "C major", 22.0),
    MusicExample("big band opener with shouting brass", "big band swing",
        ("four trumpets", "four trombones", "five saxophones", "archtop guitar", "piano", "double bass",
         "drum kit"),
        "up-tempo swing: saxophones state the theme in close harmony, trombones punctuate with plunger mutes, "
        "a sixteen-bar alto solo over riffs, a drum break, then a shout chorus with the whole "
        "brass high in its range and a short button ending", ("exuberant", "brassy", "elegant"),
        186, "A flat major", 105.0),
    MusicExample("minimal techno, dry and dark", "minimal techno", ("kick", "rim click", "dub chord"),
        "sparse, offbeat chord", ("dark", "dry"), 125, "D minor", 72.0),
    MusicExample("celtic reel in a pub", "celtic folk",
        ("fiddle", "tin whistle", "uilleann pipes", "bouzouki", "bodhran"),
        "racing reel in cut time, tune played three times with ever more ornament", ("merry", "headlong"),
        176, "D mixolydian", 56.0),
    MusicExample("church organ", "baroque organ", ("pipe organ",), "strict fugal sixteenths", ("stern", "radiant"),
        88, "G minor", 115.0),
    MusicExample("lush neo soul jam, laid back", "neo soul",
        ("wurlitzer electric piano", "fretless bass guitar", "dry drum kit", "wah guitar", "flugelhorn",
         "stacked humming voices"),
        "drunken pocket with the snare dragging behind the beat and hats pushed ahead, bass sliding into the "
        "one, chord stabs left hanging over the barline and a loose flugelhorn line that answers the voices",
        ("sensual", "unhurried", "golden"), 82, "E flat minor", 98.0),
    MusicExample("prog rock in odd meters", "progressive rock",
        ("hammond organ", "string machine", "overdriven guitar", "rickety piano", "melodic bass guitar",
         "drum kit with concert toms"),
        "seven-eight verses against a five-four bridge, unison runs in the organ and guitar, then a broad "
        "four-four hymn", ("adventurous", "grand"), 134, "E dorian", 145.0),
    MusicExample("gamelan", "balinese gamelan", ("bronze metallophones", "gongs", "kendang"),
        "shimmering kotekan, cyclic gong", ("glittering",), 152, "pelog scale", 42.0),
    MusicExample("noise wall", "harsh noise", ("feedback", "distorted static"), "none", ("violent",),
        100, "no fixed key", 12.0),
    MusicExample("tense spy underscore", "spy film score",
        ("twangy baritone guitar", "bongos", "vibraphone", "muted trumpets", "low flutes", "string tremolo"),
        "creeping chromatic bass line in four with bongo sixteenths and sudden brass stabs on the and of two",
        ("sly", "tense", "glamorous"), 106, "E minor", 66.0),
    MusicExample("salsa for dancing", "salsa dura",
        ("piano montuno", "timbales", "congas", "bongo bell", "trombones", "baby bass"),
        "two-three clave with a tumbao bass that skips the one and a mambo section for the trombones",
        ("fiery", "festive"), 184, "C minor", 92.0),
    MusicExample("hang drum", "solo handpan", ("handpan",), "rippling triplets", ("meditative", "clear"),
        90, "D kurd scale", 38.0),
    MusicExample("uplifting trance anthem", "uplifting trance",
        ("supersaw lead", "rolling offbeat bass", "plucked arpeggio", "white-noise risers", "choir pad",
         "punchy kick"),
        "pounding four-on-the-floor, a long beatless breakdown in which the melody appears alone on a soft pluck, "
        "a sixteen-bar snare-roll build with opening filters, then the full lead over offbeat bass",
        ("euphoric", "yearning", "bright"), 138, "F sharp minor", 135.0),
    MusicExample("desert oud", "arabic taqsim", ("oud", "riq", "qanun"),
        "free taqsim that settles into a slow ten-beat samai", ("contemplative", "proud"),
        70, "maqam bayati on D", 78.0),
    MusicExample("punk", "pop punk", ("power-chord guitar", "drums"), "fast backbeat", ("bratty",),
        188, "D major", 14.0),
    MusicExample("modern minimalism with marimbas and phasing", "minimalist ensemble",
        ("two marimbas", "bass clarinet", "vibraphone", "piano", "wordless soprano"),
        "pulsing eighth notes in twelve-beat cells that drift one step apart and lock again; new notes enter one "
        "at a time, chords change only every twenty seconds and the bass clarinet fades in and out in long "
        "breaths", ("luminous", "patient", "precise"), 178, "A mixolydian", 155.0),
    MusicExample("trip hop with strings", "trip hop",
        ("sampled strings", "slow breakbeat", "theremin-like lead", "deep bass"),
        "heavy downtempo break with lagging snare", ("paranoid", "velvety"), 68, "C minor", 64.0),
    MusicExample("hand percussion only, sparse", "frame drum study", ("frame drum", "finger cymbals"),
        "sparse seven-beat cycle", ("earthy",), 98, "no fixed key", 32.0),
    MusicExample("gospel choir sunday morning", "gospel",
        ("hammond organ with rotary speaker", "grand piano", "choir", "tambourine", "bass guitar", "drum kit"),
        "rolling twelve-eight that breaks into double-time shout with claps", ("joyful", "fervent"),
        132, "A flat major", 82.0),
    MusicExample("quiet modular synth patch", "modular ambient",
        ("modular synthesizer", "tape delay"), "random plucks around a slow clock", ("curious", "gentle"),
        64, "G lydian", 170.0),
    MusicExample("polka party", "polka", ("accordion", "tuba", "clarinet", "snare drum"), "brisk oom-pah",
        ("jolly",), 124, "F major", 24.0),
)
# fmt: on


def deployed_text(example: MusicExample) -> str:
    """Return the caption that the model reads for an example: one ASCII line with the same seven parts.

    A whole number of seconds is written without a fraction. Raises ValueError when a field contains a line break or
    another character outside printable ASCII, because such a prompt would not have the deployed form.
    """
    text = (
        f"Genre: {example.genre}. Instruments: {', '.join(example.instruments)}. Rhythm: {example.rhythm}. "
        f"Mood: {', '.join(example.mood)}. Tempo: {example.bpm} BPM. Key: {example.key}. "
        f"Length: {example.seconds:g} seconds."
    )
    if not (text.isascii() and text.isprintable()):
        raise ValueError(f"the example {example.request!r} holds characters outside printable ASCII")
    return text


def calibration_prompts(count: int | None = None) -> list[str]:
    """Return the first `count` deployed captions, or all of them, as calibration prompts.

    Every prefix mixes styles, tempi and text lengths, so that a small `count` still covers a wide range. Each caption
    states its example's own length, independent of the generated length. Raises ValueError when `count` is below 1 or
    above the number of examples.
    """
    available = len(MUSIC_EXAMPLES)
    if count is None:
        count = available
    if not 1 <= count <= available:
        raise ValueError(f"count {count} is out of range (1..{available})")
    return [deployed_text(example) for example in MUSIC_EXAMPLES[:count]]

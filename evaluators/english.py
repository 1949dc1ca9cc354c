"""English word lists of the rule-based tagger in language.py: closed classes whole, open ones as prompts use them.

All in lower case. A word that no list or ending knows is taken for a noun, so nouns are listed only where an ending
would mislead.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words(
    """
    a all an another any both each either every neither no some the these this those
    """
)
POSSESSIVES = _words(
    """
    her his its my our their whose your
    """
)
PRONOUNS = _words(
    """
    anyone anything everyone everything he herself him himself i it itself me nothing she someone something that
    them themselves they us we what which who whom you
    """
)
PREPOSITIONS = _words(
    """
    about above across after against along alongside amid among around at atop before behind below beneath beside
    besides between beyond by despite down during for from in inside into like near of off on onto out outside
    over past per through throughout to toward towards under underneath up upon via with within without
    """
)
COORDINATORS = _words(
    """
    and but nor or
    """
)
SUBORDINATORS = _words(
    """
    although as because if since so than though until when where whereas while
    """
)
AUXILIARIES = _words(
    """
    am are be been being can could did do does had has have having is may might must shall should was were will
    would
    """
)
GENITIVES = frozenset(("'s", "\u2019s"))
PARTICLES = GENITIVES | _words("not n't")
NUMBERS = _words(
    """
    eight eighteen eighty eleven fifteen fifty five forty four fourteen hundred nine nineteen ninety one seven
    seventeen seventy six sixteen sixty ten thirteen thirty thousand three twelve twenty two zero
    """
)
ADVERBS = _words(
    """
    again almost also always apart away even ever far forth forward here just nearby never next now often once
    only outward overhead still then there together too underfoot upside very
    """
)
# In -ly all the same.
NOT_ADVERBS = _words(
    """
    ally anomaly assembly belly bully butterfly dragonfly family firefly fly folly italy jelly july lily
    melancholy monopoly
    """
)

# A property before a noun and a thing elsewhere: "an orange cup", "a red orange".
ADJECTIVES_OR_NOUNS = _words(
    """
    antique beige black blue brown ceramic classic crescent crimson cyan gold gray green grey
    indigo ivory lavender liquid magenta maroon navy orange original oval pink plastic purple red round scarlet
    silver solid square tan teal turquoise violet white yellow
    """
)
ADJECTIVES = _words(
    """
    able achy acoustic active adorable aerodynamic aesthetic afraid aged alike alive alone amazing ancient angry
    angular arched arid aromatic artificial artistic asleep asymmetrical athletic attractive audible awake
    barefoot barren beautiful bent big billowy bitter bland blind bluish blunt bold bouncy brave breathtaking
    breezy bright brilliant brittle broad broken bubbly bulky bumpy bushy bustling busy buttery calm candlelit
    careful caring carved casual catchy cautious celestial certain challenging cheap checkered cheerful cheesy
    chewy chic chilly chipped choppy chubby chunky circular clean clear closed cloudy clumsy coiled cold colorful
    colourful comfortable comforting comfy common complete complex conical contemporary cool cottony cozy cracked
    creamy creative crisp crispy crooked crumbly crumpled crunchy crusty crystal-clear crystalline cubic curious
    curly curved curvy cute cylindrical dainty damp dangerous dappled dark dazzling dead deaf decadent decorative
    deep delectable delicate delicious dense dewy diamond-shaped different difficult digital dim dirty distant
    domed dotted double dramatic dreamy drowsy dry dull dusty dynamic earthy eastern easy eerie elastic electric
    electronic elegant elongated embroidered emotional empty endless energetic engraved enormous entire ephemeral
    eternal exclusive exotic expensive expressive faded faint fake famous fancy fantastic fashionable fast
    favorite favourite feathery festive few fierce fiery final fine firm first fizzy flaky flat fleeting flexible
    flimsy floppy floral floury fluent fluffy fluid fluorescent fluttery foamy foggy foreign formal formidable
    fragile fragrant frayed freezing fresh friendly frosty frothy frozen full functional furry futuristic fuzzy
    gaunt gauzy gentle geometric giant gigantic glacial glamorous glassy gleeful glittery glossy glum gnarled
    golden good gooey gorgeous graceful grainy grand grandiose grassy gray-haired greasy great greedy greenish
    grim grimy gritty gusty hairy handmade handsome handwoven happy hard hardy hazy healthful healthy heart-shaped
    hearty heavy hexagonal high historic hollow homeless homemade hot huge humble humid hungry hypnotic icy
    idyllic ill imaginary immaculate immense important impressive inactive infinite informal injured inner insane
    inspirational instant interactive international intricate invisible iridescent itchy jagged jazzy joyful
    joyous juicy jumpy kind lanky large last lazy leafy leaky lean leather-bound leathery left-hand legal
    lightweight likely limp little lively local lofty lone lonely long loose loud lovely low lower lucky lukewarm
    luminous lumpy lunar lush lustrous luxurious luxury lyrical magical magnificent main majestic major many
    massive matte medical mellow melodic memorable mental messy metallic mild mini miniature minor minty
    mischievous misty modern moist monochrome moody moonlit more mossy most motivational much muddy multi-colored
    multicolored multicoloured murky muscular musical musty mysterious mystical mythical naked narrow nasty
    natural naughty nautical neat necessary neon neutral new nice nimble noisy nordic northern nostalgic
    nutritious nutty obedient oblong octagonal oily old old-fashioned ominous opaque open optional opulent organic
    ornate other outer own painted pale pasty patchy patient patterned peaceful peculiar pentagonal perfect perky
    perpetual personal petite physical picturesque pillowy plaid plain playful pleasant pliable plump plush
    pointed pointy polished political poor potential powdery powerful practical precious prehistoric pretty
    priceless prickly pristine productive professional public pudgy puffy pungent pyramidal quaint quick quiet
    quilted radiant ragged rainy rapid rare raw ready real rectangular reddish regal relentless religious remote
    resilient rich right-hand rigid ripe risky roasty robust rocky romantic roomy rosy rough rounded rowdy royal
    rubbery rugged rumpled runny rural rustic rusty sacred sad safe saggy salty same sandy sane satiny savory
    scaly scary scenic scruffy scrumptious second sensory serene several shabby shadowy shady shaggy shaky shallow
    sharp sheer shimmery shiny short showy sick silent silky silly similar simple sincere single skilled skillful
    skinny sleek sleepy slender slick slim slimy slippery sloped slow slushy sly small smelly smoky smooth snowy
    snug soaked social soft sooty sophisticated soulful sour southern sparkly sparse special speckled spherical
    spicy spiky spiritual splendid splendorous spongy spotless spotted springy spry squeaky squishy stained
    stainless stale star-shaped starry stately static steamy steep sterile sticky stiff stocky stony stormy stout
    straight striped strong stubby stunning sturdy stylish subtle sugary sunlit sunny superb supple supreme sure
    surreal svelte sweaty sweet symmetrical tactile tall tame tangy tart tasty tattered tense textural textured
    thick thin third thirsty thorny thoughtful tidy tie-dye tight tiled timeless tinny tiny tired toasty tough
    towering traditional tranquil transcendent translucent transparent treacherous trendy triangular tropical
    tubular tufted twisty ugly unhealthy unique unkempt unlikely unripe unsuspecting upper upright uptight urban
    urgent useful useless vain valuable various vast velvety verdant vibrant vigilant vintage virtual visible
    visual vivid voluminous wacky warm wary wavy waxy wayward weak weary weathered webbed weedy weightless western
    wet whitish whole wholesome wicked wide wild windy wintry wiry wise wispy witty wobbly wondrous wooden woody
    woolen woollen woolly worn wrinkled yellowish young yummy zen zesty zingy
    """
)
ADJECTIVE_ENDINGS = (
    "ous",
    "ful",
    "less",
    "able",
    "ible",
    "ical",
    "ular",
    "shaped",
    "-like",
    "esque",
    "colored",
    "coloured",
)
NOT_ADJECTIVES = _words(
    """
    armful bucketful cable constable fistful glassful handful mouthful spoonful table timetable vegetable
    """
)

# Things in -ing and -ed, and kinds of things before another noun ("a dining table").
NOUNS_LIKE_PARTICIPLES = _words(
    """
    awning baking bed bedding being bowling building camping ceiling clothing coating cutting dining drawing
    dressing duckling dumpling earring evening feeling fishing flooring frosting gosling hiking hundred icing king
    lighting lightning living magnifying meaning measuring meeting morning offering opening painting parking
    pudding railing ring rocking rolling sapling seating serving setting sewing shed shopping sibling sled
    sleeping spring steering stitching string stuffing styling swimming thing topping training vending watering
    wedding wing wrapping
    """
)
# Verbs in their plain form, unless they stand where only a noun can.
VERBS = _words(
    """
    add admire adorn applaud appreciate arrange ascend attach attract bake beckon become begin belong blend bloom
    bring browse build carry celebrate chirp chirrup choose chop clap clean clench cling collect combine complain
    complement compose conduct contain create cuddle dangle decorate deliver describe deserve destroy develop
    devour dig disappear discover dominate draw drip drive eat elevate embrace emerge enhance enjoy ensure entwine
    evoke examine excite explore extend exude fascinate fill flicker float flow flutter follow give gleam glide
    glint glisten go graze grow hang happen harvest hear hold hop hug hum illuminate imagine inspire invite jog
    juggle keep knit know laugh lead lean leap learn lend let linger listen loom lounge lurk make melt moisturize
    nestle observe overlook perform pour prepare preserve pretend propel protect provide pull quench read receive
    reflect relax release remain remove resemble rustle say scatter see seem serve sew shimmer shine shiver
    showcase sing sip sit sizzle sleep slither snuggle soar soothe sparkle sprawl sprout squeeze steal stir strike
    struggle surround sway swim swirl take tantalize teach tell think transform try twinkle twirl understand
    unlock use waft wag wander wear weave weigh whisper write
    """
)
# Before a determiner any noun can be a verb ("mix the dough"); these can elsewhere too ("rest on").
VERBS_OR_NOUNS = _words(
    """
    blow boil break catch chase climb cover crash crouch cry dance dive drape dress drift drop echo fall feature
    flash fly gather hover jot jump jut kick land launch lay lie look march meet move nap perch play pose practice
    race reach rest ride rise roll run rush sail shake slide smile spill spin splash stand start stay step stop
    stretch swing talk travel turn twist wait walk wave work yawn
    """
)
# Past forms that do not end in -ed.
PAST_FORMS = _words(
    """
    ate began bent bit blew bought bound broke brought built burnt came chose chosen clung crept dealt drank drawn
    drew driven drove eaten fallen fed fell flew flown fought found froze gave given got grew grown held hidden
    hung kept knew laid led lent lit lost made met paid ran rang ridden risen rode said sang sank sat saw seen
    sent sewn shone shook shot shown slept slid sold sought spent spoke spread spun stole stood strode struck
    stuck swam swept swore swung taken taught threw thrown told took torn understood went woke won wore woven
    written wrote
    """
)

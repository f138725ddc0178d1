-- A gallery of one model per row of `gallery`; its images are a partition of `image`.

CREATE TABLE gallery (
    number integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    space text NOT NULL UNIQUE,             -- the model's vector space
    dim integer NOT NULL,                   -- length of the vectors
    width integer NOT NULL,                 -- length of a raw feature
    encoder text NOT NULL,                  -- what computes raw features: a hash of the backbone's weights
    heads bytea NOT NULL,                   -- the maps from a raw feature to both vectors, see `spaces.Heads`
    in_use boolean NOT NULL DEFAULT false,
    created timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX gallery_in_use ON gallery (in_use) WHERE in_use;

CREATE SEQUENCE image_stamp;

CREATE TABLE image (
    gallery integer NOT NULL,
    id text COLLATE "C" NOT NULL,
    stamp bigint NOT NULL DEFAULT nextval('image_stamp'),       -- new with each write of the row
    written xid8 NOT NULL DEFAULT pg_current_xact_id(),         -- the transaction of that write
    added timestamptz NOT NULL DEFAULT now(),
    position bigint NOT NULL,                                   -- order of equal scores
    pid bigint,
    camid integer NOT NULL,
    time timestamptz,
    image text,
    thumbnail bytea,
    raw vector,                             -- feature before the heads
    given vector,                           -- of a row that was written without one: both vectors, joined
    current halfvec NOT NULL,               -- unit vectors, for the index
    base halfvec NOT NULL,
    PRIMARY KEY (gallery, id),
    CHECK ((raw IS NULL) <> (given IS NULL))
) PARTITION BY LIST (gallery);
ALTER TABLE image
    ALTER raw SET STORAGE EXTERNAL, ALTER given SET STORAGE EXTERNAL, ALTER thumbnail SET STORAGE EXTERNAL,
    ALTER current SET STORAGE EXTERNAL, ALTER base SET STORAGE EXTERNAL;
CREATE INDEX image_written ON image (gallery, written);
CREATE INDEX image_pid ON image (gallery, pid);
CREATE INDEX image_camera ON image (gallery, camid, time);
CREATE INDEX image_position ON image (gallery, position, id);
CREATE INDEX image_age ON image (gallery, COALESCE(time, added));

-- Stamps that are no longer valid, so that a copy in memory can drop their rows. They name nobody.
CREATE TABLE removed (
    gallery integer NOT NULL,
    stamp bigint NOT NULL,
    written xid8 NOT NULL DEFAULT pg_current_xact_id(),
    time timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX removed_written ON removed (gallery, written);
CREATE INDEX removed_time ON removed (time);

CREATE FUNCTION restamp() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.stamp := nextval('image_stamp');
    NEW.written := pg_current_xact_id();
    RETURN NEW;
END $$;
CREATE TRIGGER image_restamped BEFORE UPDATE ON image FOR EACH ROW EXECUTE FUNCTION restamp();

CREATE FUNCTION note_removed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO removed (gallery, stamp) SELECT gallery, stamp FROM before;
    NOTIFY gallery;
    RETURN NULL;
END $$;
CREATE TRIGGER image_deleted AFTER DELETE ON image
    REFERENCING OLD TABLE AS before FOR EACH STATEMENT EXECUTE FUNCTION note_removed();
CREATE TRIGGER image_updated AFTER UPDATE ON image
    REFERENCING OLD TABLE AS before FOR EACH STATEMENT EXECUTE FUNCTION note_removed();

CREATE FUNCTION note_written() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NOTIFY gallery;
    RETURN NULL;
END $$;
CREATE TRIGGER image_inserted AFTER INSERT ON image FOR EACH STATEMENT EXECUTE FUNCTION note_written();

CREATE TABLE audit (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    time timestamptz NOT NULL DEFAULT now(),
    key text,                               -- name of the API key; null = the service requires no keys
    action text NOT NULL,
    version bigint,                         -- gallery version that was searched or written
    ids text[] NOT NULL DEFAULT '{}',
    facts jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_time ON audit (time);
